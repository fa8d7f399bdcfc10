"""Faults put in on purpose: killed commands, damaged files, full disks; docs/reliability.md says what comes of them."""
