"""method=vera: two trained vectors for each module between fixed random matrices shared by all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from dstune.config.fields import setting
from dstune.methods._peft import ModuleAdapter
from dstune.methods._peft.config import ModuleAdapterConfig
from dstune.protocols import method

if TYPE_CHECKING:
    import torch
    from torch import nn

    from dstune.planning.architecture import Architecture, Tensor


@dataclass(frozen=True)
class VeraConfig(ModuleAdapterConfig):
    """Two trained vectors for each module between fixed random matrices shared by all (Kopiczko et al. 2023, arXiv:2310.11454).

    Use it for many small adapters: a tenth of LoRA's parameters at a higher rank. Every adapter is saved with the shared
    matrices.
    """

    name: str = "vera"
    rank: int = setting(256, at_least=1)
    """Rows of the shared matrices; more than with LoRA, since each costs one trained number a module."""
    dropout: float = setting(0.0, at_least=0.0, below=1.0)
    """Dropout in front of the adapters."""
    first_scale: float = setting(0.1, above=0.0)
    """First value of the vector between the two matrices."""
    projection_seed: int = setting(0, at_least=0)
    """Seed of the shared matrices; they are saved with the adapter."""


@method
class Vera(ModuleAdapter):
    Config = VeraConfig
    config: VeraConfig

    learning_rate = 1e-2

    peft_type = "VERA"
    adapter_name = "VeRA"
    tensor_marks = (".vera_lambda_",)
    renamed: ClassVar[dict[str, str]] = {
        "rank": "r",
        "dropout": "vera_dropout",
        "first_scale": "d_initial",
        "projection_seed": "projection_prng_key",
    }

    @property
    def adapter_dropout(self) -> float:
        return self.config.dropout

    def added(self, model: Architecture) -> tuple[Tensor, ...]:
        return tuple(self._vectors(model))

    def _vectors(self, model: Architecture) -> Iterator[Tensor]:
        """Yield the two trained vectors of each module: one number for each output, and one for each row of the shared matrix."""
        from dstune.planning.adapters import linear_modules
        from dstune.planning.architecture import Tensor

        for module, (outputs, _), layer in linear_modules(model, self.targets):
            yield Tensor(f"{module}.vera_lambda_b", (outputs,), layer=layer)
            yield Tensor(f"{module}.vera_lambda_d", (self.config.rank,), layer=layer)

    def fill(self, module: nn.Module, trained: Mapping[str, torch.Tensor]) -> None:
        """Set the two random matrices that all modules share, from `trained`."""
        for inner in module.modules():
            for buffer in ("vera_A", "vera_B"):
                if hasattr(inner, buffer):
                    getattr(inner, buffer)["default"] = trained[f"base_model.{buffer}.default"].float()

    def settings(self, common: dict[str, Any]) -> Any:
        from dstune.models.peft_import import peft

        return peft.VeraConfig(
            r=self.config.rank,
            vera_dropout=self.config.dropout,
            d_initial=self.config.first_scale,
            projection_prng_key=self.config.projection_seed,
            **common,
        )
