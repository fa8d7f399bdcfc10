"""The scenes of a loop: what a user names, what is done to each, and who works on many of them."""
