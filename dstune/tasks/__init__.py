"""A folder a task; each registers itself. What belongs to a task stands in its folder and nowhere else."""

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
"""In tables and messages these come first, in this order; the first one is the default."""
