"""Point clouds and splats: PLY files, and the points that training starts from."""
