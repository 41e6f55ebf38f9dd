"""method=ia3: a trained scale for each key, value and feed-forward feature (Liu et al. 2022, arXiv:2205.05638)."""

from __future__ import annotations

from dstune.config.method_schema import Ia3Config
from dstune.protocols import Method, method


@method
class Ia3(Method):
    Config = Ia3Config
    config: Ia3Config
