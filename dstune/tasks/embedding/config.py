"""The keys of `task=embedding`."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from dstune.config.fields import setting
from dstune.protocols.task import TaskConfig


class Pooling(Enum):
    mean = "mean"
    cls = "cls"
    last = "last"


@dataclass(frozen=True)
class EmbeddingConfig(TaskConfig):
    """A vector for a text, learnt from texts that belong together; all others of a step are what does not."""

    name: str = "embedding"
    pooling: Pooling = Pooling.mean
    """Which states of the last layer become the text's vector: the `mean` of its tokens, the first (`cls`) or the `last` one."""
    temperature: float = setting(0.05, above=0.0)
    """Cosine similarities are divided by this; a lower value gives the nearest texts more weight."""
    symmetric: bool = False
    """Train the other direction too: from each positive to its anchor."""
