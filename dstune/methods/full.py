"""method=full: all weights are trained."""

from __future__ import annotations

from dstune.config.method_schema import FullConfig
from dstune.protocols import Method, method


@method
class Full(Method):
    Config = FullConfig
    config: FullConfig
