"""A file or folder for each optimizer and each schedule of the learning rate; each registers itself."""

ORDER = (
    "adamw",
    "adamw_8bit",
    "lion",
    "muon",
    "sgd",
    "cosine",
    "linear",
    "constant",
    "warmup_stable_decay",
    "slanted_triangular",
)
"""In tables and messages these come first, in this order; the first of each kind is the default."""
