"""Trained models that answer: the verbs `predict` and `generate`."""
