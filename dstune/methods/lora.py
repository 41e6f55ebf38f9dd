"""method=lora: low-rank adapters (Hu et al. 2021, arXiv:2106.09685) on frozen weights."""

from __future__ import annotations

from dstune.config.method_schema import LoraConfig
from dstune.protocols import Method, method


@method
class Lora(Method):
    Config = LoraConfig
    config: LoraConfig
