"""optimizer=adamw_8bit: AdamW with moments in 8 bits (Dettmers et al. 2022, arXiv:2110.02861)."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from dstune.config.schema import OptimizerOffload
from dstune.core.errors import Problem
from dstune.optim.adamw import betas_problem
from dstune.optim.adamw_8bit.config import BLOCK, PLAIN, ROUNDED, AdamW8bitConfig
from dstune.protocols import Optimizer, method_of, optimizer, parallelism_of

if TYPE_CHECKING:
    import torch

    from dstune.config.schema import RunConfig


@optimizer
class AdamW8bit(Optimizer):
    Config = AdamW8bitConfig
    config: AdamW8bitConfig
    decoupled_weight_decay = True
    states_per_parameter = 2
    why_no_other_layout = (
        f"optimizer=adamw_8bit rounds its states in blocks of {BLOCK} elements of a rank's partition, and in this layout the"
        " partitions are different"
    )

    def check(self) -> Iterator[Problem]:
        yield from betas_problem(self.config.betas, "[0.9,0.999]")

    def check_run(self, run: RunConfig) -> Iterator[Problem]:
        if run.zero.offload_optimizer is not OptimizerOffload.none:
            reason = "8-bit states in host memory or on a disk have not been tested"
            fix = "zero.offload_optimizer=none, or optimizer=adamw"
            yield Problem("zero.offload_optimizer", reason, fix, run.zero.offload_optimizer.name)
        if (parallelism := parallelism_of(run.parallel)).weight_ranks > 1:
            reason = "8-bit states have not been tested where each rank has slices of the weights"
            yield Problem("parallel", reason, "parallel=none, or optimizer=adamw", parallelism.name)
        if method_of(run.method).alters_updates:
            reason = f"method={run.method.name} changes updates and states, which has not been tested with 8-bit states"
            yield Problem("optimizer", reason, "optimizer=adamw", "adamw_8bit")

    def missing(self) -> Iterator[Problem]:
        if importlib.util.find_spec("bitsandbytes") is None:
            yield Problem(
                "optimizer",
                "needs the package bitsandbytes",
                "pip install '.[qlora]' in a clone of dstune",
                "adamw_8bit",
            )

    def kind(self, name: str, shape: Sequence[int], *, is_table: bool) -> str:
        # The paper keeps the states of embeddings in 32 bits: their gradients differ by orders of magnitude from row to row.
        return PLAIN if is_table or len(shape) < 2 else ROUNDED

    def state_bytes(self, kind: str) -> float:
        return 8.0 if kind == PLAIN else 2 * (1 + 4 / BLOCK)

    def build(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        from dstune.optim.adamw_8bit.step import AdamW8bitStep

        return AdamW8bitStep(groups, self.config)
