"""`dstune prune`: a smaller model cut from a larger one, in depth and in the width of its feed-forward layers."""
