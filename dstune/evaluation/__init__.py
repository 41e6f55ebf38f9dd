"""The verb `evaluate`: metrics of a run, an export or a model."""
