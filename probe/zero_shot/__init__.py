"""Probes without training: correspondence and retrieval."""
