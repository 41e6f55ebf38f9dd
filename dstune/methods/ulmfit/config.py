"""The keys of `method=ulmfit`."""

from __future__ import annotations

from dataclasses import dataclass

from dstune.config.fields import setting
from dstune.protocols.method import MethodConfig


@dataclass(frozen=True)
class UlmfitConfig(MethodConfig):
    """Layers are unfrozen one after another from the top, each at a lower rate than the one above (ULMFiT, arXiv:1801.06146).

    Use it for few rows, and against forgetting: lower layers are trained late and change little. Together with
    `schedule=slanted_triangular` these are the three techniques of Howard and Ruder (2018). All weights have optimizer states
    from the start.
    """

    name: str = "ulmfit"
    rate_factor: float = setting(2.6, at_least=1.0)
    """The rate of a layer is that of the layer above it divided by this."""
    unfreeze_epochs: float = setting(1.0, at_least=0.0)
    """Passes over the rows before the next layer begins to train; 0 trains all from the start."""
    unfreeze_steps: int | None = setting(None, at_least=1)
    """Optimizer steps before the next layer begins to train; replaces `unfreeze_epochs` when given."""
    layers_at_once: int = setting(1, at_least=1)
    """Layers that begin to train together, for deep models."""
    language_model_epochs: int = setting(0, at_least=0)
    """Passes over the texts of the rows as a language model before the classifier is trained; decoders only."""
    language_model_lr: float | None = setting(None, above=0.0)
    """Peak learning rate of that stage; `optimizer.lr` when not given."""
