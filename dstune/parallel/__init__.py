"""A file a way to share one row or one layer between ranks; each registers itself."""

ORDER = ("none", "ulysses", "tensor")
"""In tables and messages these come first, in this order; the first one is the default."""
