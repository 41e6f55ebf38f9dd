"""method=prefix: trained keys and values in front of every layer's own (Li and Liang 2021, arXiv:2101.00190)."""

from __future__ import annotations

from dstune.config.method_schema import PrefixConfig
from dstune.protocols import Method, method


@method
class Prefix(Method):
    Config = PrefixConfig
    config: PrefixConfig
