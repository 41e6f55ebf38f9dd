"""The keys of `task=token_classification`."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from dstune.config.fields import setting
from dstune.data.tags import TagScheme
from dstune.protocols.task import TaskConfig


class TrainedSubwords(Enum):
    first = "first"
    all = "all"


@dataclass(frozen=True)
class TokenClassificationConfig(TaskConfig):
    """A tag for each word: named entities, parts of speech."""

    name: str = "token_classification"
    labels: list[str] = setting([])
    """Tag names in the order of their indices; found in the training rows when empty. Gives names to tags that are numbers."""
    scheme: TagScheme = TagScheme.auto
    """`bio`: entities by B- and I- tags, which are checked; `plain`: any tags; `auto`: `bio` if all tags have this form."""
    repair: bool = False
    """Let an I- tag that continues no entity begin one (as in IOB1); otherwise its row is a bad row."""
    subwords: TrainedSubwords = TrainedSubwords.first
    """Sub-words of a word that count in the loss; metrics count the first one only."""
    stride: int = setting(64, at_least=0)
    """Sub-words that chunks of a sentence longer than `data.max_length` have in common; at most half a chunk."""
