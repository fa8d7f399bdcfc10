"""What a run folder holds: configuration, checkpoints, records, and the scene bundle made of them."""
