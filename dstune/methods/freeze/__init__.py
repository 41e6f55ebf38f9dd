"""method=freeze: some weights stay unchanged: embeddings, layers, or parameters that match a regular expression."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from dstune.config.convert import format_value
from dstune.config.schema import RunConfig
from dstune.core.errors import Problem
from dstune.methods._layers import rates_of_layers
from dstune.methods.freeze.config import FreezeConfig
from dstune.protocols import Method, method

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

    from dstune.planning.architecture import Architecture, Tensor


@method
class Freeze(Method):
    Config = FreezeConfig
    config: FreezeConfig

    moves_weights = True

    @classmethod
    def example(cls) -> FreezeConfig:
        return FreezeConfig(embeddings=True)

    def check(self, run: RunConfig) -> Iterator[Problem]:
        config = self.config
        if not (config.embeddings or config.first_layers or config.last_layers or config.parameters):
            fix = (
                "method.first_layers=4, method.embeddings=true or method.parameters=[mlp]; all weights are method=full"
            )
            yield Problem("method", "nothing would be frozen", fix, "freeze")
        for key, patterns in (("parameters", config.parameters), ("trained", config.trained)):
            for pattern in patterns:
                try:
                    re.compile(pattern)
                except re.error as error:
                    reason = f"this is no regular expression: {error}"
                    yield Problem(f"method.{key}", reason, "see Python's re", format_value(pattern))

    def apply(self, model: PreTrainedModel, run: RunConfig) -> nn.Module:
        from dstune.methods.freeze.apply import freeze_parts

        freeze_parts(model, self.config)
        return model

    def rates(self, module: nn.Module) -> Callable[[str], float]:
        return rates_of_layers(module, self.config.layer_decay)

    def trained(self, model: Architecture) -> tuple[tuple[Tensor, ...], int]:
        trained = tuple(tensor for tensor in model.tensors if not self._is_frozen(tensor, model.layers))
        return trained, model.parameters - sum(tensor.count for tensor in trained)

    def _is_frozen(self, tensor: Tensor, layers: int) -> bool:
        """Return whether `apply` freezes a tensor, from the configuration alone."""
        config = self.config
        if any(re.search(pattern, tensor.name) for pattern in config.trained):
            return False
        if tensor.layer is None:
            below = config.embeddings and any(part in tensor.name for part in ("embed", "shared"))
        else:
            below = tensor.layer < config.first_layers or tensor.layer >= layers - config.last_layers
        return below or any(re.search(pattern, tensor.name) for pattern in config.parameters)
