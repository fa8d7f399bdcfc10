"""`fit3d-lift`."""
