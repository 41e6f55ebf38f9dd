"""A copy of the start model as the reference, for methods without an adapter that could be switched off."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dstune.config.schema import OptimizerOffload, Precision, RunConfig, stage_of
from dstune.core.distributed import World
from dstune.models.kernels import use_kernels
from dstune.models.load import load_model
from dstune.protocols import METHODS
from dstune.tasks.reinforcement.config import ReinforcementConfig
from dstune.tasks.reinforcement.head import PolicyHead, Targets
from dstune.zero import accelerator
from dstune.zero.ds_config import deepspeed_config
from dstune.zero.engine import Engine
from dstune.zero.parts import partitioned_loading
from dstune.zero.precision import DTYPES

activity = logging.getLogger(__name__)


class StartModel:
    """The reference model: partitioned at stage 3, else complete on every rank."""

    def __init__(self, engine: Engine, head: PolicyHead):
        self._engine, self._head = engine, head

    def share_prompts(self, world: World) -> bool:
        return self._head.share_prompts(self._engine.forward, self._engine.device, world)

    def log_probabilities(self, targets: Targets) -> Tensor:
        """Compute the reference's log-probabilities, fp32 [targets]. At stage 3 every rank calls this equally often."""
        with torch.no_grad():
            return self._head.log_probabilities(self._engine.forward, targets)

    def close(self) -> None:
        self._engine.close()


def load_start_model(config: RunConfig, tokenizer: Any, world: World, precision: Precision) -> StartModel:
    """Load the model of `config` with the weights that training starts from, on this rank together with the others."""
    assert isinstance(config.task, ReinforcementConfig)
    activity.info("loading the reference %s", config.model.path)
    zero = replace(config.zero, stage=3 if stage_of(config.zero) == 3 else 0, offload_optimizer=OptimizerOffload.none)
    start = replace(config, method=METHODS.default(), zero=zero)
    settings = deepspeed_config(start, world.size, precision, on_gpu=accelerator.present())
    with partitioned_loading(settings):
        model = load_model(start, tokenizer, (), DTYPES[precision])
    use_kernels(model, config.model)
    head = PolicyHead(config.task, model)
    engine = Engine(model, None, settings, world)
    engine.train(False)
    head.examine(engine.forward, engine.device)
    return StartModel(engine, head)
