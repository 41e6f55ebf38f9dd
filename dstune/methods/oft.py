"""method=oft: orthogonal rotations of the modules' inputs, block by block."""

from __future__ import annotations

from collections.abc import Mapping
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
class OftConfig(ModuleAdapterConfig):
    """Orthogonal rotations of the modules' inputs, block by block (Qiu et al. 2023, arXiv:2306.07280; 2025, arXiv:2506.19847).

    Use it if the geometry of the pretrained features has to be preserved: the angles between neurons do not change.
    """

    name: str = "oft"
    block_size: int = setting(32, at_least=2)
    """Features rotated together; where it does not divide a module's inputs, peft takes the nearest size that does."""
    dropout: float = setting(0.0, at_least=0.0, below=1.0)
    """Share of the blocks that do not rotate in a forward pass."""
    block_share: bool = False
    """One rotation for all blocks of a module."""
    exact: bool = False
    """Cayley transform by solving instead of five terms of its series: exactly orthogonal, and slower."""


@method
class Oft(ModuleAdapter):
    Config = OftConfig
    config: OftConfig

    learning_rate = 2e-4

    peft_type = "OFT"
    adapter_name = "OFT"
    tensor_marks = (".oft_R.",)
    renamed: ClassVar[dict[str, str]] = {"block_size": "oft_block_size", "dropout": "module_dropout"}
    ours_alone = ("exact",)

    @property
    def adapter_dropout(self) -> float:
        return self.config.dropout

    def added(self, model: Architecture) -> tuple[Tensor, ...]:
        """Return the entries above the diagonal of each block: at least as many as there are."""
        from dstune.planning.adapters import low_rank

        return tuple(low_rank(model, self.targets, -(-self.config.block_size // 2), experts=False))

    def fill(self, module: nn.Module, trained: Mapping[str, torch.Tensor]) -> None:
        """Set the row and column indices of the rotations' entries, which checkpoints do not have."""
        import torch

        inner: Any
        for inner in module.modules():
            if hasattr(inner, "rows") and hasattr(inner, "cols"):
                inner.rows, inner.cols = torch.triu_indices(inner.block_size, inner.block_size, 1)

    def settings(self, common: dict[str, Any]) -> Any:
        from dstune.models.peft_import import peft

        return peft.OFTConfig(
            r=0,
            oft_block_size=self.config.block_size,
            module_dropout=self.config.dropout,
            block_share=self.config.block_share,
            use_cayley_neumann=not self.config.exact,
            **common,
        )
