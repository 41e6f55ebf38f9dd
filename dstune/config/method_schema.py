"""The typed configuration of `method`: what is trained."""

from __future__ import annotations

from dataclasses import dataclass

from dstune.config.fields import setting


@dataclass(frozen=True)
class FullConfig:
    """All weights are trained."""

    name: str = "full"


@dataclass(frozen=True)
class HeadConfig:
    """Only the task's head is trained; the body stays frozen."""

    name: str = "head"


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters (Hu et al. 2021, arXiv:2106.09685) on frozen weights."""

    name: str = "lora"
    rank: int = setting(16, at_least=1)
    """Rank of the update matrices."""
    alpha: float = setting(32.0, above=0.0)
    """The update is scaled by alpha / rank (alpha / sqrt(rank) with `rslora`)."""
    dropout: float = setting(0.0, at_least=0.0, below=1.0)
    """Dropout in front of the adapters."""
    target_modules: list[str] = setting(["all-linear"])
    """Module name endings that get an adapter; `all-linear` is every linear layer except the head."""
    modules_to_save: list[str] = setting([])
    """Modules trained whole and saved beside the adapter (a new classification head always is)."""
    rslora: bool = False
    """Rank-stabilised scaling (Kalajdzievski 2023, arXiv:2312.03732)."""


MethodConfig = FullConfig | HeadConfig | LoraConfig

METHODS: dict[str, type] = {"full": FullConfig, "head": HeadConfig, "lora": LoraConfig}
"""Classes of the group by the name of the choice."""
