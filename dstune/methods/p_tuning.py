"""method=p_tuning: a trained prompt that comes out of a small network (Liu et al. 2021, arXiv:2103.10385)."""

from __future__ import annotations

from dstune.config.method_schema import PTuningConfig
from dstune.protocols import Method, method


@method
class PTuning(Method):
    Config = PTuningConfig
    config: PTuningConfig
