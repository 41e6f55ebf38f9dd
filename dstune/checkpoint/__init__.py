"""Checkpoints of a run: writes them atomically, prunes, reads and exports them."""
