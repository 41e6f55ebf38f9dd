"""optimizer=muon: orthogonal updates of matrices (Jordan et al. 2024), AdamW for all other parameters."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from dstune.config.schema import OptimizerOffload
from dstune.core.errors import Problem
from dstune.optim.adamw import betas_problem
from dstune.optim.muon.config import MATRIX, REST, MuonConfig
from dstune.protocols import Optimizer, method_of, optimizer, parallelism_of

if TYPE_CHECKING:
    import torch

    from dstune.config.schema import RunConfig

IN_A_LAYER = re.compile(r"\.\d+\.")
"""Found in the names of parameters inside of layers."""
STACKED = ".experts."
"""Found in the names of stacked experts, [experts, rows, columns]."""


@optimizer
class Muon(Optimizer):
    Config = MuonConfig
    config: MuonConfig
    decoupled_weight_decay = True
    states_per_parameter = 2

    def check(self) -> Iterator[Problem]:
        yield from betas_problem(self.config.betas, "[0.9,0.999]")

    def check_run(self, run: RunConfig) -> Iterator[Problem]:
        if run.zero.offload_optimizer is OptimizerOffload.nvme:
            reason = "an update needs complete matrices, but of states on a disk only a part is in memory at a time"
            fix = "zero.offload_optimizer=cpu, or optimizer=adamw"
            yield Problem("zero.offload_optimizer", reason, fix, "nvme")
        if (parallelism := parallelism_of(run.parallel)).weight_ranks > 1:
            reason = "an update needs complete matrices, but each rank has only slices of them"
            yield Problem("parallel", reason, "parallel=none, or optimizer=adamw", parallelism.name)
        if method_of(run.method).alters_updates:
            reason = f"method={run.method.name} changes updates entry by entry, but orthogonal updates are of complete matrices"
            yield Problem("optimizer", reason, "optimizer=adamw", "muon")

    def kind(self, name: str, shape: Sequence[int], *, is_table: bool) -> str:
        is_matrix = len(shape) == 2 or (len(shape) == 3 and STACKED in name)
        return MATRIX if is_matrix and not is_table and IN_A_LAYER.search(name) else REST

    def state_bytes(self, kind: str) -> float:
        return 4.0 if kind == MATRIX else 8.0

    def build(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        from dstune.optim.muon.step import MuonStep

        return MuonStep(groups, self.config)
