"""parallel=tensor; `dstune.models.tensor` and `dstune.zero.slices` compute it."""

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


@dataclass(frozen=True)
class TensorConfig(ParallelConfig):
    """Several ranks share the weights of each layer (Shoeybi et al. 2019, arXiv:1909.08053): each has some of the heads and a
    part of the feed-forward width."""

    name: str = "tensor"
    size: int = setting(2, at_least=2)
    """Ranks that share a model's weights; has to divide the world size, the numbers of query and key heads, and the MLP width."""


@parallelism
class Tensor(Parallelism):
    Config = TensorConfig
    config: TensorConfig
    sent_in_layers = "weights, and sum activations"

    @property
    def weight_ranks(self) -> int:
        return self.config.size

    def check(self, run: RunConfig) -> Iterator[Problem]:
        from dstune.config.parallel_rules import check_tensor

        yield from check_tensor(run)

    def weights_problems(self, values: Mapping[str, Any]) -> list[Problem]:
        from dstune.config.parallel_rules import slices_problems

        return slices_problems(values, self.config.size)
