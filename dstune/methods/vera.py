"""method=vera: two trained vectors for each module between fixed random matrices shared by all."""

from __future__ import annotations

from dstune.config.method_schema import VeraConfig
from dstune.protocols import Method, method


@method
class Vera(Method):
    Config = VeraConfig
    config: VeraConfig
