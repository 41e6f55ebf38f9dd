"""An import that is not possible."""

raise ImportError("a library is missing")
