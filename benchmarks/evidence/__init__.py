"""Does distillation gain? Scenes, lifts, students, controls and rounds, scored by exact probes: every number anew."""
