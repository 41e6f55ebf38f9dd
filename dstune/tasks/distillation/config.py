"""The keys of `task=distillation`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from dstune.config.fields import setting
from dstune.tasks.chat.config import ChatConfig


@dataclass(frozen=True)
class DistillationConfig(ChatConfig):
    """The model learns the next-token distributions of a teacher, on rows of chat or plain text."""

    needs: ClassVar[str] = "task.teacher=FOLDER"
    name: str = "distillation"
    teacher: str | None = None
    """The model to learn from: folder, hub id, sample, or the directory of a run with an export. It has the tokens of the model.
    When not given, the model itself with its new adapter switched off, which holds a run with `text_weight` near its start."""
    teacher_revision: str | None = setting(None, example="main", needs="task.teacher=ORG/MODEL")
    """Branch, tag or commit of `teacher` on the hub; resolved to a commit before the ranks start."""
    teacher_cache: bool = False
    """Let the teacher read all rows once, before the model is loaded, and keep its hidden states of their targets in the cache
    (`DSTUNE_CACHE`): it is not in memory beside the model, and neither later epochs nor later runs on the same rows run it."""
    beta: float = setting(0.5, at_least=0.0, at_most=1.0)
    """Which divergence: 0 is the forward KL of the student from the teacher, 1 the reverse KL, between them the generalised
    Jensen-Shannon divergence (TRL's GKD: `beta`)."""
    temperature: float = setting(1.0, above=0.0)
    """Logits of both are divided by this before they are compared (TRL's GKD: 0.9). The loss is not multiplied by its square."""
    on_policy: float = setting(0.0, at_least=0.0, at_most=1.0)
    """Share of steps that train on the model's own answers to the prompts of the rows, sampled as `task=reinforcement` samples
    (GKD's lambda; TRL: `lmbda`, 0.5 there)."""
    max_new_tokens: int = setting(128, at_least=1)
    """Longest such answer, in tokens."""
    sampling_temperature: float = setting(1.0, above=0.0)
    """Temperature at which these answers are sampled."""
    text_weight: float = setting(0.0, at_least=0.0, at_most=1.0)
    """Share of the cross entropy of the rows' own tokens in the loss (axolotl: `kd_ce_alpha`); the rest is the divergence."""
