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
    QuestionAnsweringConfig,
    RewardConfig,
    Seq2SeqConfig,
    TokenClassificationConfig,
)
from dstune.models.heads.answers import AnswerHead
from dstune.models.heads.base import Batch, Forward, Head, HeadOutput, Rows, WindowHead, sums_of
from dstune.models.heads.classification import classification_head
from dstune.models.heads.embedding import EmbeddingHead
from dstune.models.heads.language import CausalLmHead, EncoderDecoderHead
from dstune.models.heads.preference import JudgedHead, PairHead
from dstune.models.heads.reward import reward_head
from dstune.models.heads.tokens import token_classification_head
from dstune.protocols.task import TaskConfig

__all__ = ["Batch", "Forward", "Head", "HeadOutput", "WindowHead", "build_head", "sums_of"]


def build_head(task: TaskConfig, model: PreTrainedModel, rows: Rows | None = None) -> Head:
    """The head of a task; must be built before DeepSpeed puts its own hooks on the model.

    rows: how a language model gets its rows, where not as they are.
    """
    match task:
        case ChatConfig() | CausalLmConfig():
            return CausalLmHead(model, rows)
        case Seq2SeqConfig():
            return EncoderDecoderHead(model) if model.config.is_encoder_decoder else CausalLmHead(model, rows)
        case ClassificationConfig():
            return classification_head(task)
        case TokenClassificationConfig():
            return token_classification_head
        case QuestionAnsweringConfig():
            return AnswerHead(task.max_answer_tokens)
        case PreferenceConfig():
            return JudgedHead(task, model) if task.single else PairHead(task, model)
        case RewardConfig():
            return reward_head
        case EmbeddingConfig():
            return EmbeddingHead(task)
    raise AssertionError(f"no head for {task!r}")
