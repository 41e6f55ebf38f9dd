"""What the user wants verified beside the built-in cases. Agents read it from the command line and send it to their ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Options:
    deepspeed: dict[str, Any] | None = None
    """A DeepSpeed configuration, as the user's trainer reads it."""
    network: dict[str, Any] | None = None
    """The config.json of a model of transformers."""
    lora: bool = False
    """Train adapters: peft's on `network`, otherwise those of the tiny models."""
    precision: str = ""
    """fp32, bf16 or fp16; if empty, that of `deepspeed`, or fp32."""

    @property
    def any(self) -> bool:
        """Whether the user wants anything of their own verified."""
        return bool(self.deepspeed is not None or self.network is not None or self.lora or self.precision)
