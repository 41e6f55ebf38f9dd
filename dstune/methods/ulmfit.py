"""method=ulmfit: gradual unfreezing from the top, a lower rate for each layer below (Howard and Ruder 2018, arXiv:1801.06146)."""

from __future__ import annotations

from dstune.config.method_schema import UlmfitConfig
from dstune.protocols import Method, method


@method
class Ulmfit(Method):
    Config = UlmfitConfig
    config: UlmfitConfig
