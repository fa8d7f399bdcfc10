"""The things of a room: its shell, furniture and what stands on it, and where they stand."""
