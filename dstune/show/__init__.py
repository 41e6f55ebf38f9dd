"""The verb `dstune data show`: rows as the model sees them, in the terminal, as HTML or as JSON."""
