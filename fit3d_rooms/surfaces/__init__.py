"""What surfaces look like: textures, motifs and materials."""
