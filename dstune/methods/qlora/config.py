"""The keys of `method=qlora`."""

from __future__ import annotations

from dataclasses import dataclass

from dstune.methods.lora.config import LoraConfig


@dataclass(frozen=True)
class QloraConfig(LoraConfig):
    """Low-rank adapters on frozen weights that are kept in 4-bit NF4 (Dettmers et al. 2023, arXiv:2305.14314).

    Use it if the frozen weights do not fit otherwise: they take a quarter of their 16-bit size, at the cost of slower steps and a
    small loss of accuracy.
    """

    name: str = "qlora"
    double_quantization: bool = True
    """Quantize the scales of the blocks of 64 weights as well: 4.13 instead of 4.5 bits a weight."""
