"""The typed configuration of `forgetting`: what keeps a model near to what it knew before."""

from __future__ import annotations

from dataclasses import dataclass

from dstune.config.fields import setting


@dataclass(frozen=True)
class ForgettingConfig:
    l2sp: float = setting(0.0, at_least=0.0)
    """L2-SP: adds `l2sp`/2 x squared distance from the start weights to the loss (Li et al. 2018, arXiv:1802.01483); 0 is off."""
    ewc: float = setting(0.0, at_least=0.0)
    """EWC: the same distance, each entry weighted by its Fisher information on `general` (arXiv:1612.00796); 0 is off."""
    ewc_rows: int = setting(64, at_least=1)
    """Rows of `general` for the Fisher information: the mean of each row's squared gradient at the start weights."""
    replay: float = setting(0.0, at_least=0.0, below=1.0)
    """Share of an epoch's rows that come from `general`, mixed in like a source of `data.mixture`; 0 is off."""
    general: str | None = setting(None, example="rows.jsonl", needs="forgetting.replay=0.1")
    """Rows of what the model must not forget, for `ewc` and `replay`: a value as for `data.train`, in the task's format."""
