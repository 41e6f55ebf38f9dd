"""method=importance: only the most important share of the weights is trained, the others keep every bit."""

from __future__ import annotations

from dstune.config.method_schema import ImportanceConfig
from dstune.protocols import Method, method


@method
class Importance(Method):
    Config = ImportanceConfig
    config: ImportanceConfig
