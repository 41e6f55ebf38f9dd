"""Metrics of evaluations: which there are (`dstune.protocols.METRICS`), which way is better, and those that tasks share."""
