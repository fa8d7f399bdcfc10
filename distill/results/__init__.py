"""What a training leaves: the result and its card, metrics and the report."""
