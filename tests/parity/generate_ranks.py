"""Program on every rank: a model at ZeRO-3 of which a share is gathered once, and what its forward passes gather beside that."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from deepspeed.runtime.zero import partition_parameters
from parity.accumulate_ranks import TARGETS, micro_batch, window_config
from support.ranks import end_with, start_rank

from dstune.config.schema import Precision
from dstune.models.load import load_model, load_tokenizer
from dstune.optim.groups import parameter_groups
from dstune.protocols import optimizer_of, task_of
from dstune.trainer import generation
from dstune.zero.ds_config import deepspeed_config
from dstune.zero.engine import Engine
from dstune.zero.parts import partitioned_loading

SHARES = (0.0, 0.5, 0.9, 1.0)
PROMPTS = [[10, 11, 12], [13, 14, 15, 16], [17, 18]]


def main() -> None:
    world = start_rank()
    model_path, file = json.loads(sys.argv[1])
    config = window_config(model_path, 3)
    settings = deepspeed_config(config, world.size, Precision.bf16, on_gpu=False)
    tokenizer = load_tokenizer(config.model)
    with partitioned_loading(settings):
        model = load_model(config, tokenizer, (), torch.bfloat16)
    head = task_of(config.task).head(model)
    engine = Engine(model, optimizer_of(config.optimizer), settings, world, groups=parameter_groups(model, 0.0))
    elements, gather = [0], partition_parameters._dist_allgather_fn

    def counted(part, whole, *more, **further):
        elements[0] += whole.numel()
        return gather(part, whole, *more, **further)

    partition_parameters._dist_allgather_fn = counted
    found = []
    for share in SHARES:
        generation.room_for_weights = lambda engine, world, share=share: int(share * generation.weights_bytes(engine))
        with generation.speaking(engine, world) as (module, in_step):
            for _ in range(2):  # a first pass might use what is gathered and give it back
                before = elements[0]
                with torch.no_grad():
                    logits = module(input_ids=micro_batch(0)["input_ids"]).logits
            passed = elements[0] - before
        answers = generation.answers_on_all_ranks(engine, tokenizer, PROMPTS, 6, [], world)
        loss = float(engine.accumulate(head, micro_batch(1), batch_weight=TARGETS, last=False))
        found.append([in_step, passed, float(logits.double().sum()), answers, loss])
    if world.is_main:
        Path(file).write_text(json.dumps([sum(p.ds_numel for p in engine.module.parameters()), found]))
    engine.close()


if __name__ == "__main__":
    end_with(main)
