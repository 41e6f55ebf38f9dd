"""Program of the elastic tests, on every rank: an engine takes over a checkpoint and saves it again without a step."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from support.ranks import end_with, start_rank

from dstune.checkpoint.shards import Shards
from dstune.config.run_file import read_run
from dstune.models.load import load_model, load_tokenizer
from dstune.optim.groups import method_groups
from dstune.protocols import method_of, optimizer_of
from dstune.zero.ds_config import deepspeed_config
from dstune.zero.engine import Engine
from dstune.zero.parts import partitioned_loading
from dstune.zero.precision import DTYPES, resolve


def main() -> None:
    world = start_rank()
    for case in json.loads(sys.argv[1]):
        config = read_run(Path(case["run_yaml"])).config
        precision = resolve(config)
        settings = deepspeed_config(config, world.size, precision, on_gpu=False)
        with partitioned_loading(settings):
            model = load_model(config, load_tokenizer(config.model), (), DTYPES[precision])
        module = method_of(config.method).apply(model, config)
        optimizer, groups = optimizer_of(config.optimizer), method_groups(config, module)
        engine = Engine(module, optimizer, settings, world, groups=groups)
        source = Shards(Path(case["from"]))
        engine.restore(source)
        if engine.stage in (1, 2):  # also what other ranks update, which they send
            for name, parameter in engine.module.named_parameters():
                if parameter.requires_grad:
                    assert torch.equal(parameter, source.read(name).view(parameter.shape).to(parameter.dtype)), name
        target = Path(case["to"])
        target.mkdir(parents=True, exist_ok=True)
        assert not engine.save(target.parent, target.name).error
        world.barrier()


if __name__ == "__main__":
    end_with(main)
