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
    "deepspeed",
)
"""Order in tables and messages; plugins come after these. The first of each kind is the default."""
