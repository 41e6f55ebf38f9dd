"""Program on every rank: gradients that the engine accumulates over one global batch of bf16 micro-batches, into a file."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping

import torch
from support.configs import run_config
from support.ranks import end_with, start_rank

from dstune.config import schema
from dstune.core.distributed import World
from dstune.models.load import load_model, load_tokenizer
from dstune.optim.groups import parameter_groups
from dstune.optim.sgd import SgdConfig
from dstune.protocols import optimizer_of, task_of
from dstune.zero.ds_config import deepspeed_config
from dstune.zero.engine import Engine
from dstune.zero.parts import partitioned_loading

MICRO_BATCHES, TOKENS, MASKED = 64, 16, 4
TARGETS = MICRO_BATCHES * (TOKENS - MASKED)


def micro_batch(index: int) -> dict[str, torch.Tensor]:
    """One row of tokens of the tiny model's vocabulary, the same on every rank."""
    tokens = torch.randint(9, 100, (1, TOKENS), generator=torch.Generator().manual_seed(index))
    labels = tokens.masked_fill(torch.arange(TOKENS) < MASKED, -100)
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": labels}


def window_config(model: str, stage: int) -> schema.RunConfig:
    return run_config(
        model=schema.ModelConfig(path=model),
        optimizer=SgdConfig(lr=0.1),
        zero=schema.ZeroConfig(stage=stage, param_persistence_threshold=0),
        trainer=schema.TrainerConfig(
            micro_batch_size=1, global_batch_size=MICRO_BATCHES, precision=schema.Precision.bf16, grad_clip=0.0
        ),
    )


def accumulated(model_path: str, stage: int, accumulate_in: str | None, world: World) -> Mapping[str, torch.Tensor]:
    """The whole gradient of each parameter, in fp32. accumulate_in: another type than dstune asks DeepSpeed for."""
    from deepspeed.utils import safe_get_full_grad

    config = window_config(model_path, stage)
    settings = deepspeed_config(config, world.size, schema.Precision.bf16, on_gpu=False)
    assert settings["gradient_accumulation_steps"] * world.size == MICRO_BATCHES
    if accumulate_in is not None:
        settings["data_types"] = {"grad_accum_dtype": accumulate_in}
    with partitioned_loading(settings):
        model = load_model(config, load_tokenizer(config.model), (), torch.bfloat16)
    head = task_of(config.task).head(model)
    groups = parameter_groups(model, 0.0)
    engine = Engine(model, optimizer_of(config.optimizer), settings, world, groups=groups)
    mine = range(world.rank, MICRO_BATCHES, world.size)
    for index in mine:
        engine.accumulate(head, micro_batch(index), batch_weight=TARGETS, last=index == mine[-1])
    gradients = {name: safe_get_full_grad(p).float().cpu() for name, p in engine.module.named_parameters()}
    engine.close()
    return gradients


def main() -> None:
    world = start_rank()
    for case in json.loads(sys.argv[1]):
        gradients = accumulated(case["model"], case["stage"], case["accumulate_in"], world)
        if world.is_main:
            torch.save(gradients, case["file"])


if __name__ == "__main__":
    end_with(main)
