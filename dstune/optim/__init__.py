"""A file an optimizer or a schedule of the learning rate; each registers itself."""

ORDER = ("adamw", "sgd", "cosine", "linear", "constant", "warmup_stable_decay", "slanted_triangular")
"""In tables and messages these come first, in this order; the first of each kind is the default."""
