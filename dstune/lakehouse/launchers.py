"""`launch=spark` registers on import."""

from dstune.lakehouse import spark

__all__ = ["spark"]
