"""A file or folder a fine-tuning method; each registers itself. What belongs to a method stands there and nowhere else."""

ORDER = (
    "full",
    "head",
    "features",
    "freeze",
    "ulmfit",
    "importance",
    "lora",
    "qlora",
    "ia3",
    "vera",
    "oft",
    "prompt",
    "prefix",
    "p_tuning",
)
"""In tables and messages these come first, in this order; the first one is the default."""

REFUSED = {
    "adalora": "it takes ranks away by the gradients of single parameters between backward pass and update, and partitioned"
    " stages do not keep them (method=lora with method.rank_pattern sets ranks by hand)"
}
"""Methods of the field that are not offered, and why."""
