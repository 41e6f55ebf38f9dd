"""Program on every rank: steps of an engine with each optimizer, saved between them and taken up by another engine.

The trainer is left out: a case takes a second. What the engines did is written to a file, and judged by the test.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from parity.accumulate_ranks import micro_batch
from support.configs import run_config
from support.ranks import end_with, start_rank

from dstune.checkpoint.shards import Shards
from dstune.config import schema
from dstune.core.distributed import World
from dstune.models.load import load_model, load_tokenizer
from dstune.optim.groups import method_groups
from dstune.protocols import OPTIMIZERS, optimizer_of, task_of
from dstune.zero.ds_config import deepspeed_config
from dstune.zero.engine import Engine
from dstune.zero.parts import gathered, partitioned_loading
from dstune.zero.precision import DTYPES

MICRO_BATCHES = 6
"""Of one step. Divided by 1, 2 and 3 ranks: at stage 3 a rank with one forward pass more than others waits for them for ever."""
TARGETS = MICRO_BATCHES * 12
RATE = 1e-3


def made(model_path: str, case: Mapping[str, Any], world: World) -> tuple[Engine, Any]:
    optimizer = OPTIMIZERS.classes()[case["optimizer"]].Config(lr=RATE, weight_decay=0.1)
    offload = schema.OptimizerOffload[case.get("offload", "none")]
    config = run_config(
        model=schema.ModelConfig(path=model_path),
        optimizer=optimizer,
        zero=schema.ZeroConfig(stage=case["stage"], param_persistence_threshold=0, offload_optimizer=offload),
        trainer=schema.TrainerConfig(
            micro_batch_size=1,
            global_batch_size=MICRO_BATCHES,
            precision=schema.Precision[case["precision"]],
            grad_clip=0.0,
        ),
    )
    settings = deepspeed_config(config, world.size, config.trainer.precision, on_gpu=False)
    with partitioned_loading(settings):
        model = load_model(config, load_tokenizer(config.model), (), DTYPES[config.trainer.precision])
    head = task_of(config.task).head(model)
    engine = Engine(model, optimizer_of(config.optimizer), settings, world, groups=method_groups(config, model))
    return engine, head


def step(engine: Engine, head: Any, number: int, world: World) -> None:
    engine.set_learning_rate(RATE)
    mine = range(world.rank, MICRO_BATCHES, world.size)
    for index in mine:
        batch = micro_batch(100 * number + index)
        engine.accumulate(head, batch, batch_weight=TARGETS, last=index == mine[-1])
    assert engine.update().applied


def weights(engine: Engine) -> dict[str, torch.Tensor]:
    parameters = dict(engine.module.named_parameters())
    with gathered(list(parameters.values())):
        return {name: parameter.detach().clone().float() for name, parameter in parameters.items()}


def main() -> None:
    world = start_rank()
    given = json.loads(sys.argv[1])
    folder = Path(given["folder"])
    for case in given["cases"]:
        engine, head = made(given["model"], case, world)
        found: dict[str, Any] = {}
        if "takes" in case:  # a checkpoint of another layout
            engine.restore(Shards(folder / case["takes"] / "saved"))
        else:
            for number in range(2):
                step(engine, head, number, world)
            if world.is_main:
                (folder / case["name"] / "saved").mkdir(parents=True)
            world.barrier()
            assert not engine.save(folder / case["name"], "saved").error
            found["before"] = weights(engine)
        step(engine, head, 2, world)
        found["after"] = weights(engine)
        engine.close()
        if "takes" not in case:
            again, head = made(given["model"], case, world)
            again.load(folder / case["name"], "saved")
            step(again, head, 2, world)
            found["continued"] = weights(again)
            again.close()
        if world.is_main:
            (folder / case["name"]).mkdir(exist_ok=True)
            torch.save(found, folder / case["name"] / "weights.pt")
        world.barrier()


if __name__ == "__main__":
    end_with(main)
