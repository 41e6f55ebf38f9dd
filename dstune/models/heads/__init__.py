"""What a task computes from a batch: the sum of its losses and what its metrics need.

A head gets `forward` (DeepSpeed's engine, or a plain model in tests) and a batch; it never divides by anything, because
the weight of a window is known to the trainer only.
"""

from __future__ import annotations

from transformers import PreTrainedModel

from dstune.config.task_schema import (
    CausalLmConfig,
    ChatConfig,
    ClassificationConfig,
    EmbeddingConfig,
    PreferenceConfig,
    RewardConfig,
    TaskConfig,
)
from dstune.models.heads.base import Batch, Forward, Head, HeadOutput, WindowHead, sums_of
from dstune.models.heads.classification import classification_head, multi_label_head
from dstune.models.heads.embedding import EmbeddingHead
from dstune.models.heads.language import CausalLmHead
from dstune.models.heads.preference import JudgedHead, PairHead
from dstune.models.heads.reward import reward_head

__all__ = ["Batch", "Forward", "Head", "HeadOutput", "WindowHead", "build_head", "sums_of"]


def build_head(task: TaskConfig, model: PreTrainedModel) -> Head:
    """The head of a task; must be built before DeepSpeed puts its own hooks on the model."""
    match task:
        case ChatConfig() | CausalLmConfig():
            return CausalLmHead(model)
        case ClassificationConfig():
            return multi_label_head if task.multi_label else classification_head
        case PreferenceConfig():
            return JudgedHead(task, model) if task.single else PairHead(task, model)
        case RewardConfig():
            return reward_head
        case EmbeddingConfig():
            return EmbeddingHead(task)
