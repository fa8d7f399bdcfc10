"""Data sets of the probes, each in the layout that its users download."""
