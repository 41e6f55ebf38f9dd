"""method=freeze: a part of the weights stays as it is: embeddings, layers, or what a regular expression finds."""

from __future__ import annotations

from dstune.config.method_schema import FreezeConfig
from dstune.protocols import Method, method


@method
class Freeze(Method):
    Config = FreezeConfig
    config: FreezeConfig
