"""Trains a temporary copy of the model to observe its gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from dstune.config.schema import Precision, RunConfig
from dstune.core.distributed import World
from dstune.data.prepared import PreparedData
from dstune.models.heads import Head, on_device
from dstune.models.kernels import use_kernels
from dstune.models.load import NewWeights, load_model, new_weights
from dstune.models.unreached import keep_frozen
from dstune.optim.groups import method_groups
from dstune.optim.sgd import SgdConfig
from dstune.protocols import method_of, optimizer_of, task_of
from dstune.trainer.data_loader import data_loader_of
from dstune.trainer.prefetcher import dropout_seed, prefetched_steps
from dstune.zero import accelerator
from dstune.zero.ds_config import deepspeed_config
from dstune.zero.engine import Engine
from dstune.zero.masks import Change
from dstune.zero.parts import partitioned_loading
from dstune.zero.precision import DTYPES

Restrict = Callable[[nn.Module, NewWeights], None]


@dataclass(frozen=True)
class Probe:
    engine: Engine
    head: Head
    config: RunConfig
    data: PreparedData
    world: World
    new: NewWeights
    tokenizer: Any

    def train(self, steps: int, change: Change, rate: float) -> int:
        """Train `steps` optimizer steps over the first steps of the run's order; `change` as in `Engine.before_update`.

        Returns the number of applied updates: a step whose loss or gradient is not finite is skipped, and `change` is not called.
        """
        updated = 0
        self.engine.before_update(change)
        self.engine.set_learning_rate(rate)
        data_loader = data_loader_of(self.config, self.data, None, None)
        for step, feed in enumerate(
            prefetched_steps(self.config, data_loader, self.world, self.tokenizer.pad_token_id, range(steps), self.head)
        ):
            assert feed is not None, "only a stream has to be waited for"
            for position, (micro_batch, batch) in enumerate(feed.batches):
                torch.manual_seed(dropout_seed(self.config.trainer.seed, step, micro_batch.index))
                self.engine.accumulate(
                    self.head,
                    on_device(batch, self.engine.device),
                    batch_weight=feed.weight,
                    last=position == len(feed.batches) - 1,
                )
            updated += self.engine.update().applied
        return updated


@contextmanager
def probing(
    config: RunConfig,
    data: PreparedData,
    tokenizer: Any,
    precision: Precision,
    world: World,
    restrict: Restrict | None = None,
) -> Iterator[Probe]:
    """Build a copy of the run's model at the run's ZeRO stage, which trains the parameters of `config.method` without gradient
    clipping. restrict: freezes some of the parameters before the engine is built."""
    config = replace(config, trainer=replace(config.trainer, grad_clip=0.0))
    settings = deepspeed_config(config, world.size, precision, on_gpu=accelerator.present())
    with partitioned_loading(settings):
        model = load_model(config, tokenizer, data.labels, DTYPES[precision])
    new = new_weights(model)
    module = method_of(config.method).apply(model, config)
    use_kernels(module, config.model)
    head = task_of(config.task).head(model)
    if restrict is not None:
        restrict(module, new)
    keep_frozen(model)
    optimizer, groups = optimizer_of(config.optimizer), method_groups(config, module)
    engine = Engine(module, optimizer, settings, world, groups=groups)
    try:
        yield Probe(engine, head, config, data, world, new, tokenizer)
    finally:
        engine.close()


def standing_still(config: RunConfig) -> RunConfig:
    """Return `config` with a stateless optimizer and a rate of 0: for gradients at the start weights."""
    return replace(config, optimizer=SgdConfig(lr=0.0))
