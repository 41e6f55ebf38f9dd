"""Generates text with the model in training, on all ranks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn

from dstune.core.distributed import World
from dstune.generation.answers import generate_answers
from dstune.planning.host import available_bytes
from dstune.zero import accelerator
from dstune.zero.engine import Engine
from dstune.zero.parts import full_count

T = TypeVar("T")


@dataclass(frozen=True)
class Generated:
    """A row with the text that the model generated."""

    source: str
    target: str
    answer: str
    task: str = ""
    """With several tasks, the name of the row's source in `data.mixture`."""


@contextmanager
def speaking(engine: Engine, world: World) -> Iterator[tuple[nn.Module, bool]]:
    """Yield the module to generate with, in evaluation mode, and whether all ranks must call it in step.

    If the complete weights fit into half of the free memory of every rank, they are gathered once, each rank generates
    independently, and the ranks wait for each other at the end. Otherwise as many layers as fit are gathered once, the others
    stay partitioned, and every forward pass is a collective.
    """
    engine.train(False)
    if engine.slices is not None:  # no rank has all weights
        yield engine.module, True
    elif engine.stage < 3:
        yield engine.module, False
        world.barrier()
    elif weights_bytes(engine) <= (room := int(world.gather_numbers([room_for_weights(engine, world)]).min())):
        with engine.whole_module() as module:
            yield module, False
            world.barrier()
    else:
        with engine.partly_gathered(room):
            yield engine.module, True
    engine.train(True)


def weights_bytes(engine: Engine) -> int:
    return sum(full_count(parameter) * parameter.element_size() for parameter in engine.module.parameters())


def room_for_weights(engine: Engine, world: World) -> int:
    """Return how many bytes of gathered weights fit: half of the free memory (on a CPU, of this rank's share of it). Computing
    needs the other half."""
    if engine.device.type == "cpu":
        return int(available_bytes() / world.local_size) // 2
    return accelerator.free_bytes(engine.device) // 2


def answers_on_all_ranks(
    engine: Engine,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    stops: Iterable[int],
    world: World,
    images: Sequence[Mapping[str, torch.Tensor]] = (),
    batch_size: int = 1,
) -> list[str]:
    """Generate the greedy answers to `prompts` (token ids); rank 0 returns all of them. images, batch_size: see `generate_answers`.

    If every rank has room for the complete weights, rank 0 generates alone while the others wait. Otherwise the ranks share the
    prompts and generate in step through ZeRO-3's hooks. Ranks that hold slices of layers all generate the same text.
    """
    answers: list[str] = []
    with speaking(engine, world) as (module, in_step):
        shared = in_step and engine.slices is None
        if in_step or world.is_main:
            local_prompts = _dealt(prompts, world) if shared else prompts
            local_images = _dealt(images, world) if shared and images else images
            answers = generate_answers(
                module,
                tokenizer,
                local_prompts,
                max_new_tokens,
                stops,
                batch_size=batch_size,
                in_step=shared,
                images=local_images,
            )
    if not shared:
        return answers
    return [answer for row in zip(*world.gather(answers), strict=True) for answer in row][: len(prompts)]


def _dealt(prompts: Sequence[T], world: World) -> list[T]:
    """Return this rank's share: every `world.size`th prompt. All ranks get the same number, so the last ones may be repeats."""
    rows = -(-len(prompts) // world.size)
    return [prompts[(row * world.size + world.rank) % len(prompts)] for row in range(rows)]
