"""method=qlora: low-rank adapters on frozen weights that are kept in 4-bit NF4 (Dettmers et al. 2023, arXiv:2305.14314)."""

from __future__ import annotations

from dstune.config.method_schema import QloraConfig
from dstune.protocols import Method, method


@method
class Qlora(Method):
    Config = QloraConfig
    config: QloraConfig
