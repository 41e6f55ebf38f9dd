"""What a launcher is: how the ranks of one run come to be on one machine or several, and how they are asked to stop."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar


@dataclass(frozen=True)
class LaunchConfig:
    """Base of every launcher's configuration: fields of a subclass become keys `launch.FIELD`."""

    name: str = ""


class Launcher:
    """Base of every launcher. Subclasses set `Config` and register with `@dstune.launcher`."""

    Config: ClassVar[type] = LaunchConfig
    name: ClassVar[str] = ""

    def __init__(self, config: Any):
        self.config = config
