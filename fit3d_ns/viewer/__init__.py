"""What `ns-viewer` and `ns-render` show of a run's features, and what the viewer's controls do."""
