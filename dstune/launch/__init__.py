"""How runs are started. A launcher is a folder here, which registers itself; the files beside them are common to all."""

ORDER = ("local", "hostfile", "openmpi", "slurm")
"""In tables and messages these come first, in this order; the first one is the default."""
