"""Program on every rank: each method at each stage takes two steps; prints one JSON line per case on rank 0."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import torch
from support.configs import run_config
from support.ranks import end_with, start_rank

from dstune.config import schema
from dstune.core.distributed import World
from dstune.methods.freeze.config import FreezeConfig
from dstune.methods.full import FullConfig
from dstune.methods.head.config import HeadConfig
from dstune.methods.lora.config import LoraConfig
from dstune.models.load import load_model, load_tokenizer
from dstune.optim.adamw import AdamWConfig
from dstune.optim.groups import method_groups
from dstune.protocols import method_of, optimizer_of, task_of
from dstune.rank.setup import is_one_pass
from dstune.tasks.chat.config import ChatConfig
from dstune.tasks.classification.config import ClassificationConfig
from dstune.zero.ds_config import deepspeed_config
from dstune.zero.engine import Engine
from dstune.zero.parts import partitioned_loading

METHODS = {
    "full": FullConfig(),
    "head": HeadConfig(),
    "layer decay": FullConfig(layer_decay=0.5),
    "freeze": FreezeConfig(embeddings=True, first_layers=1, trained=["norm|Norm"]),
    "freeze names": FreezeConfig(parameters=["mlp|intermediate"], last_layers=1),
    "lora": LoraConfig(rank=4),
    "lora on the projection": LoraConfig(rank=4, target_modules=["q_proj", "lm_head"]),
    "projection saved whole": LoraConfig(rank=4, target_modules=["q_proj"], modules_to_save=["lm_head"]),
}


def whole(engine: Engine, *, trained: bool) -> dict[str, torch.Tensor]:
    with engine.whole_module() as module:
        named = module.named_parameters()
        return {name: p.detach().clone() for name, p in named if p.requires_grad is trained}


def run(case: dict, config: schema.RunConfig, world: World, labels: tuple[str, ...]) -> dict:
    settings = deepspeed_config(config, world.size, schema.Precision.fp32, on_gpu=False)
    with partitioned_loading(settings):
        model = load_model(config, load_tokenizer(config.model), labels, torch.float32)
    module = method_of(config.method).apply(model, config)
    head = task_of(config.task).head(model)
    optimizer, groups = optimizer_of(config.optimizer), method_groups(config, module)
    engine = Engine(module, optimizer, settings, world, groups=groups, one_pass=is_one_pass(config))
    engine.set_learning_rate(config.optimizer.lr)
    frozen, trained = whole(engine, trained=False), whole(engine, trained=True)
    losses, norms = [], []
    for step in range(2):
        generator = torch.Generator().manual_seed(10 * step + world.rank)
        tokens = torch.randint(9, 100, (2, 16), generator=generator)
        answers = torch.tensor([0, 1]) if labels else tokens.masked_fill(torch.arange(16) < 4, -100)
        batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": answers}
        weight = 2 * world.size if labels else 2 * 12 * world.size
        torch.manual_seed(world.rank)
        loss_sum = engine.accumulate(head, batch, batch_weight=weight, last=True)
        losses.append(world.sum([float(loss_sum)])[0] / weight)
        norms.append(engine.update().grad_norm)
    after = whole(engine, trained=False)
    result = {
        **case,
        "losses": losses,
        "norms": norms,
        "frozen": len(frozen),
        "frozen_equal": all(torch.equal(frozen[name], after[name]) for name in frozen),
        "trained_moved": all(not torch.equal(trained[name], w) for name, w in whole(engine, trained=True).items()),
    }
    engine.close()
    return result


def main() -> None:
    world = start_rank()
    argument = json.loads(sys.argv[1])
    for case in argument["cases"]:
        classes = case["task"] == "classification"
        config = run_config(
            model=schema.ModelConfig(path=argument["encoder" if classes else "decoder"]),
            task=ClassificationConfig() if classes else ChatConfig(),
            method=METHODS[case["method"]],
            optimizer=AdamWConfig(lr=1e-2, weight_decay=0.1),
            zero=schema.ZeroConfig(stage=case["stage"], param_persistence_threshold=0),
            trainer=schema.TrainerConfig(micro_batch_size=2, global_batch_size=2 * world.size),
        )
        if kind := case.get("checkpointing"):
            again = schema.Selective[kind] if kind == "selective" else True
            config = replace(config, trainer=replace(config.trainer, activation_checkpointing=again))
        if tiles := case.get("tiles"):
            config = replace(config, trainer=replace(config.trainer, mlp_tiles=tiles))
        if case.get("offload"):
            offload = replace(
                config.zero, offload_optimizer=schema.OptimizerOffload.cpu, offload_param=schema.Offload.cpu
            )
            config = replace(config, zero=offload)
        result = run(case, config, world, ("left", "right") if classes else ())
        if world.is_main:
            print("CASE " + json.dumps(result), flush=True)


if __name__ == "__main__":
    end_with(main)
