"""Defines a parallelism: a way to share rows or layers between ranks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from dstune.core.errors import Problem

if TYPE_CHECKING:
    from dstune.config.schema import RunConfig
    from dstune.planning.architecture import Architecture


@dataclass(frozen=True)
class ParallelConfig:
    """Base of every parallelism's configuration: fields of a subclass become keys `parallel.FIELD`."""

    name: str = ""


class Parallelism:
    """Base of every parallelism. Subclasses set `Config` and register with `@dstune.parallelism`."""

    Config: ClassVar[type] = ParallelConfig
    name: ClassVar[str] = ""
    sent_in_layers: ClassVar[str] = ""
    """What the ranks of a group share, and how, in every layer: for the warning about groups that span nodes."""

    def __init__(self, config: Any):
        self.config = config

    @property
    def row_ranks(self) -> int:
        """Number of ranks that share the positions of a row."""
        return 1

    @property
    def weight_ranks(self) -> int:
        """Number of ranks that share the weights of a layer."""
        return 1

    @property
    def size(self) -> int:
        """Number of ranks in a group; these compute the same rows."""
        return self.row_ranks * self.weight_ranks

    def check(self, run: RunConfig) -> Iterator[Problem]:
        """Yield the settings of `run` that this parallelism does not support."""
        yield from ()

    def weights_problems(self, values: Mapping[str, Any]) -> list[Problem]:
        """Return why ranks cannot share the weights of the model with this `config.json`."""
        return []

    def architecture_problems(self, model: Architecture, values: Mapping[str, Any]) -> list[Problem]:
        """Return why ranks cannot share a model of this architecture, as the planner knows it. values: its `config.json`."""
        return self.weights_problems(values)
