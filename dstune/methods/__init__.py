"""Fine-tuning methods, a file or folder each. Each registers itself; nothing about a method is written anywhere else."""

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
"""Order in tables and messages; plugins come after these. The first one is the default."""

REFUSED = {
    "adalora": "it lowers ranks by the gradients of single parameters between backward pass and update, and the partitioned ZeRO"
    " stages do not keep these gradients (method=lora with method.rank_pattern sets ranks by hand)"
}
"""Well-known methods that dstune does not offer, and why."""
