"""Penalties against forgetting: the weights' distance from their start, plain (L2-SP) or weighted by Fisher information (EWC).

Once per step, the rank that updates a weight adds the penalty's gradient to the gradient that the optimizer is about to use. So
the penalty is the same on any number of ranks and at every ZeRO stage, and costs a copy of the rank's own share. It is neither
clipped nor part of `grad_norm`: both concern the loss of the data alone.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from dstune.config.forgetting import general_rows
from dstune.config.forgetting_schema import ForgettingConfig
from dstune.config.schema import Precision, RunConfig
from dstune.core.distributed import World
from dstune.core.errors import TrainingFailed
from dstune.core.paths import cache_root
from dstune.data.build import prepare
from dstune.data.prepared import PreparedData
from dstune.models.load import NewWeights
from dstune.protocols import task_of
from dstune.protocols.task_options import TakesLabels
from dstune.trainer.probe import Restrict, probing, standing_still
from dstune.zero.engine import Engine
from dstune.zero.restore import Partition

Fisher = dict[str, torch.Tensor]
"""Fisher information of this rank's fragment of each parameter, by the parameter's name."""


class Penalties:
    """Penalties on the distance from the start weights. Build it while the model still has these weights. New weights (a head)
    have no penalty.

    The loss of a step is the data's loss + sum over entries of (l2sp + ewc * fisher) / 2 * (weight - start)^2.
    """

    def __init__(self, config: ForgettingConfig, engine: Engine, new: NewWeights, fisher: Fisher):
        self._start: dict[int, torch.Tensor] = {}
        self._strength: dict[int, torch.Tensor] = {}
        self._value: torch.Tensor | float = 0.0
        for partition in engine.partitions():
            strength = torch.zeros_like(partition.elements, dtype=torch.float32)
            for part in partition.fragments:
                if part.name not in new.parameters:
                    place = slice(part.offset, part.offset + part.count)
                    strength[place] = config.l2sp
                    if config.ewc:
                        assert fisher[part.name].numel() == part.count, f"{part.name} has another layout"
                        strength[place] += config.ewc * fisher[part.name]
            self._start[id(partition.key)] = partition.elements.detach().float().clone()
            self._strength[id(partition.key)] = strength

    def add(self, partition: Partition, gradient: torch.Tensor) -> None:
        """Add the gradient of the penalties to the `gradient` of `partition`."""
        strength = self._strength[id(partition.key)]
        # DeepSpeed pads partitions to equal sizes with uninitialized memory, which may be NaN.
        distance = (partition.elements.float() - self._start[id(partition.key)]).where(strength > 0, 0.0)
        pull = strength * distance
        self._value = self._value + 0.5 * (pull.double() * distance).sum()
        gradient.add_(pull)

    def collect(self) -> float:
        """Return the penalty of this rank's partitions for the weights before the last update, and reset it."""
        penalty, self._value = self._value, 0.0
        return float(penalty)


def general_fisher(
    config: RunConfig,
    labels: tuple[str, ...],
    tokenizer: Any,
    precision: Precision,
    world: World,
    restrict: Restrict | None = None,
) -> Fisher:
    """Compute `fisher_information` over `forgetting.general`; empty without `forgetting.ewc`. Every rank must call it."""
    if not config.forgetting.ewc:
        return {}
    rows = general_rows(config)
    if isinstance(task := task_of(rows.task), TakesLabels):
        rows = replace(rows, task=task.with_labels(labels))
    general = prepare(rows, tokenizer, world.env, cache_root(), trains=False)
    return fisher_information(config, general, tokenizer, precision, world, restrict)


def fisher_information(
    config: RunConfig,
    general: PreparedData,
    tokenizer: Any,
    precision: Precision,
    world: World,
    restrict: Restrict | None = None,
) -> Fisher:
    """Compute the empirical Fisher information at the start weights: the mean, over `forgetting.ewc_rows` rows, of the squared
    gradient of a row's loss on its own targets, without dropout. Rows without a finite gradient do not count.

    restrict: freezes all parameters that the run does not train, so that a rank has the same fragments in both engines.
    Raises TrainingFailed if no row has a finite gradient.
    """
    # A global batch of one row, so that the squared gradient is that of a single row on any number of ranks.
    trainer = replace(config.trainer, micro_batch_size=1, global_batch_size=1)
    data = replace(general_rows(config).data, packing=False)
    fisher: Fisher = {}

    def add(partition: Partition, gradient: torch.Tensor, group: dict[str, Any]) -> None:
        for part in partition.fragments:
            squared = gradient[part.offset : part.offset + part.count].float().square()
            fisher[part.name] = fisher[part.name].add_(squared) if part.name in fisher else squared

    single = standing_still(replace(config, trainer=trainer, data=data))
    with probing(single, general, tokenizer, precision, world, restrict) as probe:
        probe.engine.train(False)
        rows = probe.train(config.forgetting.ewc_rows, add, rate=0.0)
    if not rows:
        reason = "loss or gradient is not finite for any row of forgetting.general, so there is no Fisher information"
        raise TrainingFailed(f"{reason} (forgetting.ewc): look at the rows, or set trainer.precision=fp32")
    return {name: total / rows for name, total in fisher.items()}
