"""What every other package stands on: errors, files, the command line, reports, progress, processes."""
