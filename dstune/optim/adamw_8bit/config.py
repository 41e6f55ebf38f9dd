"""Keys of optimizer=adamw_8bit."""

from __future__ import annotations

from dataclasses import dataclass

from dstune.config.fields import setting
from dstune.optim.adamw import AdamWConfig

BLOCK = 256
"""Elements that share a scale, in bitsandbytes."""
ROUNDED, PLAIN = "8 bits", "32 bits"


@dataclass(frozen=True)
class AdamW8bitConfig(AdamWConfig):
    """AdamW with moments in 8 bits, by bitsandbytes (Dettmers et al. 2022, arXiv:2110.02861)."""

    name: str = "adamw_8bit"
    lr: float = setting(2e-5, at_least=0.0, by_method=True)
    """Peak learning rate; if unset, the method's default (docs/methods.md), a tenth of it for task=preference|reinforcement."""
