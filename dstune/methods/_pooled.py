"""Base of `head` and `features`: the body stays frozen, and a classifier on top of it is trained."""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, Any

from dstune.protocols import Method
from dstune.protocols.method_options import ReplacesHead

if TYPE_CHECKING:
    from dstune.planning.architecture import Architecture, Tensor


class Pooling(Enum):
    model = "model"
    cls = "cls"
    mean = "mean"
    last = "last"


class PooledHead(Method, ReplacesHead):
    config: Any
    """A configuration with `pooling`, `layers` and `dropout`."""

    learning_rate = 1e-2
    why_not_shared_rows = "it reads one vector of the whole row"

    @property
    def own_head(self) -> dict[str, Any] | None:
        config = self.config
        if config.pooling is Pooling.model:
            return None
        return {"pooling": config.pooling.value, "layers": config.layers, "dropout": config.dropout}

    def trained(self, model: Architecture) -> tuple[tuple[Tensor, ...], int]:
        trained = tuple(t for t in model.tensors if t.name.startswith(("classifier", "score", "pooler", "head.")))
        if not trained:  # a language model's head; if it is tied, that is the embedding
            trained = tuple(t for t in model.tensors if t.name == "lm_head.weight") or model.tensors[:1]
        return trained, model.parameters - sum(t.count for t in trained)
