"""The exact protocol: features once, every row solved, scored with intervals."""
