"""Command lines on trained runs."""
