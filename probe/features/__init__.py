"""Frozen features of a probe: the rows of its table, the fine-tuned backbones in them, and features kept on disk."""
