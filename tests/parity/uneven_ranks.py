"""Program on every rank: gradients of a model of which rows decide what they reach, beside those of one plain process."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace
from typing import Any

import torch
from support.configs import run_config
from support.ranks import end_with, start_rank
from torch import nn

from dstune.config import schema
from dstune.core.distributed import World
from dstune.optim.groups import parameter_groups
from dstune.optim.sgd import SgdConfig
from dstune.protocols import optimizer_of
from dstune.zero.ds_config import deepspeed_config
from dstune.zero.engine import Engine

WIDTH, STEPS, CLIP = 8, 3, 0.05


class Layer(nn.Module):
    """A linear layer; with an adapter, only that is trained."""

    def __init__(self, inputs: int, outputs: int, adapted: bool):
        super().__init__()
        self.base = nn.Linear(inputs, outputs)
        self.adapter = (
            nn.Sequential(nn.Linear(inputs, 2, bias=False), nn.Linear(2, outputs, bias=False)) if adapted else None
        )
        self.base.requires_grad_(not adapted)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return self.base(states) if self.adapter is None else self.base(states) + self.adapter(states)


class Routed(nn.Module):
    """Two layers of experts as modules of their own, a tower for images and two heads."""

    def __init__(self, adapted: bool):
        super().__init__()
        self.first = Layer(WIDTH, WIDTH, adapted)
        self.tower = Layer(3, WIDTH, adapted)
        self.lower = nn.ModuleList(Layer(WIDTH, WIDTH, adapted) for _ in range(4))
        self.upper = nn.ModuleList(nn.Sequential(Layer(WIDTH, n, adapted), Layer(n, WIDTH, adapted)) for n in (3, 5, 7))
        self.heads = nn.ModuleList(Layer(WIDTH, 1, adapted) for _ in range(2))
        self.never = Layer(WIDTH, 2, adapted)

    def forward(self, rows: torch.Tensor, route: tuple[int, ...]) -> torch.Tensor:
        image, lower, upper, head = route
        states = torch.tanh(self.first(rows))
        if image:
            states = states + self.tower(rows[:, :3])
        states = states + torch.tanh(self.lower[lower](states))
        states = states + torch.tanh(self.upper[upper](states))
        return self.heads[head](states)


def micro_batch(case: dict[str, Any], step: int, number: int) -> dict[str, Any]:
    """Rows, and the parts of the model that they reach. The first step of an `even` case reaches the same on all ranks."""
    generator = torch.Generator().manual_seed(97 * step + number)
    rows = torch.randn(3, WIDTH, generator=generator)
    other = 0 if case["even"] and step == 0 else number
    route = (int((step + other) % 2), (step + other) % 4, (step + 2 * other) % 3, int(other % 3 == 1))
    return {"rows": rows, "route": route}


def loss(forward: Any, batch: dict[str, Any]) -> SimpleNamespace:
    rows = batch["rows"]
    parameter = next(iter((getattr(forward, "module", forward)).parameters()))
    outputs = forward(rows.to(parameter.dtype), batch["route"]).float()
    total = (outputs - rows.sum(1, keepdim=True)).square().sum()
    return SimpleNamespace(loss_sum=total)


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Relative L2 of all gradients together."""
    difference = sum(float((one[name] - other[name]).square().sum()) for name in other)
    return (difference / sum(float(value.square().sum()) for value in other.values())) ** 0.5


def measure(case: dict[str, Any], world: World) -> dict[str, float]:
    """Return the largest distance of the gradient, of its norm and of the weights after a step to those of the plain process."""
    from deepspeed.utils import safe_get_full_grad

    dtype = getattr(torch, case["dtype"])
    precision = schema.Precision.bf16 if dtype is torch.bfloat16 else schema.Precision.fp32
    per_rank = case["accumulation"]
    config = run_config(
        optimizer=SgdConfig(lr=0.1),
        zero=schema.ZeroConfig(stage=case["stage"], reduce_bucket_size=case["bucket"]),
        trainer=schema.TrainerConfig(
            micro_batch_size=3, global_batch_size=3 * per_rank * world.size, precision=precision, grad_clip=CLIP
        ),
    )
    settings = deepspeed_config(config, world.size, precision, on_gpu=False)
    settings["zero_optimization"] |= case["zero"]
    torch.manual_seed(0)
    model, plain = Routed(case["adapted"]).to(dtype), Routed(case["adapted"]).to(dtype)
    groups = parameter_groups(model, 0.0)
    engine = Engine(model, optimizer_of(config.optimizer), settings, world, groups=groups)
    engine.set_learning_rate(0.1)
    worst = {"gradient": 0.0, "norm": 0.0, "weights": 0.0}
    for step in range(STEPS):
        plain.load_state_dict(engine.module.state_dict())
        batches = [micro_batch(case, step, number) for number in range(per_rank * world.size)]
        expected = {name: torch.zeros(p.shape) for name, p in plain.named_parameters() if p.requires_grad}
        for batch in batches:
            (loss(plain, batch).loss_sum / len(batches)).backward()
            for name, parameter in plain.named_parameters():
                if parameter.grad is not None:
                    expected[name] += parameter.grad.float()
                    parameter.grad = None
        before = {name: p.detach().float().clone() for name, p in engine.module.named_parameters() if p.requires_grad}
        mine = batches[world.rank :: world.size]
        for batch in mine:
            engine.accumulate(loss, batch, batch_weight=len(batches), last=batch is mine[-1])
        gradients = {n: safe_get_full_grad(p) for n, p in engine.module.named_parameters() if p.requires_grad}
        gradients = {n: torch.zeros_like(expected[n]) if g is None else g.float() for n, g in gradients.items()}
        norm = float(sum(value.square().sum() for value in expected.values())) ** 0.5
        worst["gradient"] = max(worst["gradient"], distance(gradients, expected))
        worst["norm"] = max(worst["norm"], abs(engine.update().grad_norm / norm - 1))
        moved = {n: (before[n] - p.detach().float()) for n, p in engine.module.named_parameters() if p.requires_grad}
        clipped = {name: 0.1 * value * min(1.0, CLIP / norm) for name, value in expected.items()}
        if dtype is torch.float32:
            worst["weights"] = max(worst["weights"], distance(moved, clipped))
    engine.close()
    return worst


def main() -> None:
    world = start_rank()
    for case in json.loads(sys.argv[1]):
        worst = measure(case, world)
        ranks = world.gather(worst)
        if world.is_main:
            print("RESULT", json.dumps({"case": case, "ranks": ranks}), flush=True)


if __name__ == "__main__":
    end_with(main)
