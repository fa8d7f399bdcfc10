"""Procedural indoor scenes with exact depth and labels, ray-cast on a CPU: the command ``fit3d-rooms``."""
