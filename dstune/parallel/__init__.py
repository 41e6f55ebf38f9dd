"""One file for each way to share a row or a layer between ranks; each registers itself."""

ORDER = ("none", "ulysses", "tensor")
"""In tables and messages these come first, in this order; the first one is the default."""
