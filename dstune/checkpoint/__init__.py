"""Checkpoints of a run: written whole or not at all, kept by rule, read back, exported."""
