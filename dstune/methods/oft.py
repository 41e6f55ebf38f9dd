"""method=oft: orthogonal rotations of the modules' inputs, block by block."""

from __future__ import annotations

from dstune.config.method_schema import OftConfig
from dstune.protocols import Method, method


@method
class Oft(Method):
    Config = OftConfig
    config: OftConfig
