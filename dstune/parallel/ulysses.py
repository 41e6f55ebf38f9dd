"""parallel=ulysses; `dstune.models.ulysses` computes it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dstune.config.fields import setting
from dstune.core.errors import Problem
from dstune.protocols import Parallelism, parallelism
from dstune.protocols.parallelism import ParallelConfig

if TYPE_CHECKING:
    from dstune.config.schema import RunConfig
    from dstune.planning.architecture import Architecture


@dataclass(frozen=True)
class UlyssesConfig(ParallelConfig):
    """Several ranks share the positions of each row (Jacobs et al. 2023, arXiv:2309.14509), for rows that one cannot hold."""

    name: str = "ulysses"
    size: int = setting(2, at_least=2)
    """Ranks that share a row; has to divide the world size and the number of attention heads."""


@parallelism
class Ulysses(Parallelism):
    Config = UlyssesConfig
    config: UlyssesConfig
    sent_in_layers = "rows, and exchange attention"

    @property
    def row_ranks(self) -> int:
        return self.config.size

    def check(self, run: RunConfig) -> Iterator[Problem]:
        from dstune.config.parallel_rules import check_ulysses

        yield from check_ulysses(run)

    def architecture_problems(self, model: Architecture, values: Mapping[str, Any]) -> list[Problem]:
        from dstune.config.parallel_rules import CAPPED, heads_problem, uncut_problem

        capped = uncut_problem(model.kind, CAPPED) if model.soft_capped else None
        return [problem for problem in (capped, heads_problem(model.heads, self.config.size)) if problem]
