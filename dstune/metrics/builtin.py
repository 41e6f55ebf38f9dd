"""Registers the metrics that built-in tasks compute themselves, and whether lower or higher is better."""

from __future__ import annotations

from dstune.protocols import METRICS, Metric

LOWER = ("loss", "text_loss", "perplexity", "bits_per_byte", "mae", "rmse", "ter", "gap")
HIGHER = (
    *("token_accuracy", "accuracy", "f1_macro", "f1_micro", "mcc", "auroc", "pearson", "spearman"),
    *("entity_f1", "entity_precision", "entity_recall", "exact_match", "f1", "best_f1"),
    *("reward", "reward_accuracy", "reward_margin", "recall_at_1", "recall_at_5", "recall_at_10", "mrr"),
    *("bleu", "chrf", "rouge1", "rouge2", "rougeL"),
)

for _name in (*LOWER, *HIGHER):
    METRICS.add(type(_name, (Metric,), {"name": _name, "lower_is_better": _name in LOWER, "__module__": __name__}))
