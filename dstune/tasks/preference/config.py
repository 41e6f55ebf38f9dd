"""The keys of `task=preference`."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any

from dstune.config.fields import setting
from dstune.protocols.task import TaskConfig


class PreferenceLoss(Enum):
    dpo = "dpo"
    ipo = "ipo"
    kto = "kto"
    orpo = "orpo"
    simpo = "simpo"


class Reference(Enum):
    auto = "auto"
    cached = "cached"


@dataclass(frozen=True)
class PreferenceConfig(TaskConfig):
    """Two answers to a prompt, the better one first (with `kto` single answers, good or bad)."""

    name: str = "preference"
    loss: PreferenceLoss = PreferenceLoss.dpo
    """`dpo`, `ipo`, `kto` (against a reference model), `orpo` or `simpo` (without one). The supervised term of `orpo` is the mean
    over the answer's tokens (TRL: over the prompt's too); the rewards and margins of `ipo` in the metrics are beta times the mean
    log-probability ratio of a token, as its loss has it, not the sum over the answer."""
    beta: float | None = setting(None, above=0.0)
    """Weight of the log-probability ratios, of the odds ratio with `orpo`; 0.1, and 2 with `simpo`, when not given."""
    label_smoothing: float = setting(0.0, at_least=0.0, below=0.5)
    """Share of pairs taken to be the wrong way round (`dpo` only): the conservative loss, a weighted mean of both directions (TRL's
    `sigmoid`; its `robust` is another one)."""
    gamma: float = setting(1.0, at_least=0.0)
    """Margin by which the better answer has to win (`simpo` only), on the scale of beta times the log-probability."""
    desirable_weight: float = setting(1.0, above=0.0)
    """Weight of the loss of good answers (`kto` only)."""
    undesirable_weight: float = setting(1.0, above=0.0)
    """Weight of the loss of bad answers (`kto` only)."""
    reference: Reference = Reference.auto
    """`auto`: the model without its new adapter, else computed once before training (`cached`)."""
    reference_model: str | None = None
    """Another model as the reference (folder, hub id, sample); the model that training starts from when not given."""
    reference_revision: str | None = setting(None, example="main", needs="task.reference_model=ORG/MODEL")
    """Branch, tag or commit of `reference_model` on the hub; resolved to a commit before the ranks start."""
    template_date: str | None = setting(None, example="2026-01-31")
    """The date that a template may print (`YYYY-MM-DD`); frozen to the day of composition when not given."""
    chat_template_kwargs: dict[str, Any] = setting({})
    """Arguments of the chat template, for example `{enable_thinking: false}`; a row's own come before them."""

    @property
    def single(self) -> bool:
        """Whether a sample is one answer, good or bad, instead of a pair."""
        return self.loss is PreferenceLoss.kto

    @property
    def compares(self) -> bool:
        """Whether the loss needs the log-probabilities of a reference model."""
        return self.loss in (PreferenceLoss.dpo, PreferenceLoss.ipo, PreferenceLoss.kto)


DEFAULT_BETA = {PreferenceLoss.simpo: 2.0}
"""By loss; 0.1 for the others."""


def beta_of(task: PreferenceConfig) -> float:
    """Return `task.beta`, or the default of the loss if it is not set."""
    return task.beta if task.beta is not None else DEFAULT_BETA.get(task.loss, 0.1)
