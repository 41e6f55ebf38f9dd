"""One folder for each task, which registers itself and has everything that belongs to the task."""

ORDER = (
    "chat",
    "causal_lm",
    "classification",
    "preference",
    "reinforcement",
    "distillation",
    "reward",
    "embedding",
    "token_classification",
    "question_answering",
    "seq2seq",
)
"""Tasks that come first in tables and messages, in this order; the first one is the default."""
