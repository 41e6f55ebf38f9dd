"""What a fine-tuning method is: which parameters it trains or adds, and how the result is saved, exported and merged.

`apply` and what it calls may import torch; import it inside the methods, so that the launcher and the planner stay light.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar


@dataclass(frozen=True)
class MethodConfig:
    """Base of every method's configuration: fields of a subclass become keys `method.FIELD`."""

    name: str = ""


class Method:
    """Base of every method. Subclasses set `Config` and register with `@dstune.method`."""

    Config: ClassVar[type] = MethodConfig
    name: ClassVar[str] = ""

    def __init__(self, config: Any):
        self.config = config
