"""Runs in formats that other tools read: ``fit3d-export``."""
