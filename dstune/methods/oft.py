"""method=oft: orthogonal rotations of the modules' inputs, block by block."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from dstune.config.method_schema import OftConfig
from dstune.methods._peft import ModuleAdapter
from dstune.protocols import method

if TYPE_CHECKING:
    from dstune.planning.architecture import Architecture, Tensor


@method
class Oft(ModuleAdapter):
    Config = OftConfig
    config: OftConfig

    peft_type = "OFT"
    renamed: ClassVar[dict[str, str]] = {"block_size": "oft_block_size", "dropout": "module_dropout"}
    ours_alone = ("exact",)

    @property
    def adapter_dropout(self) -> float:
        return self.config.dropout

    def added(self, model: Architecture) -> tuple[Tensor, ...]:
        """The entries above the diagonal of each block: no less than there are."""
        from dstune.planning.adapters import low_rank

        return tuple(low_rank(model, self.targets, -(-self.config.block_size // 2), experts=False))

    def settings(self, common: dict[str, Any]) -> Any:
        import peft

        return peft.OFTConfig(
            r=0,
            oft_block_size=self.config.block_size,
            module_dropout=self.config.dropout,
            block_share=self.config.block_share,
            use_cayley_neumann=not self.config.exact,
            **common,
        )
