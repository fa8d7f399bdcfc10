"""What a training leaves: measures on held-out views, the result and its card, metrics and the report."""
