"""Keys of optimizer=muon."""

from __future__ import annotations

from dataclasses import dataclass

from dstune.config.fields import setting
from dstune.optim.adamw import AdamWConfig

MATRIX, REST = "matrix", "rest"


@dataclass(frozen=True)
class MuonConfig(AdamWConfig):
    """Orthogonal updates of the matrices in layers, as large as AdamW's (Liu et al. 2025, arXiv:2502.16982); AdamW for
    embeddings, heads, norms and biases."""

    name: str = "muon"
    lr: float = setting(2e-5, at_least=0.0, by_method=True)
    """Peak learning rate; if unset, the method's default, as for adamw: updates are scaled to the size of AdamW's."""
    momentum: float = setting(0.95, at_least=0.0, below=1.0)
    """Decay rate of the momentum of a matrix."""
    orthogonalization_steps: int = setting(5, at_least=1, at_most=20)
    """Newton-Schulz iterations that make the momentum orthogonal."""
