"""A model that generates text on all ranks, and what it wrote."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import nn

from dstune.core.distributed import World
from dstune.planning.host import available_bytes
from dstune.zero import accelerator
from dstune.zero.engine import Engine
from dstune.zero.parts import full_count


@dataclass(frozen=True)
class Generated:
    """A row with what the model wrote."""

    source: str
    target: str
    answer: str
    task: str = ""
    """Of several tasks, the name of its source in `data.mixture`."""


@contextmanager
def speaking(engine: Engine, world: World) -> Iterator[tuple[nn.Module, bool]]:
    """The module to generate with, and whether all ranks have to run it in step.

    Where the whole weights fit into memory twice on every rank, they are gathered once and each rank generates what it
    likes; the others wait for it at the end. Else the weights stay partitioned, and every forward pass is a collective.
    """
    engine.train(False)
    if engine.slices is not None:  # which no rank has all of
        yield engine.module, True
    elif engine.stage < 3 or world.gather_numbers([whole_weights_fit(engine)]).all():
        with engine.whole_module() as module:
            yield module, False
            world.barrier()
    else:
        yield engine.module, True
    engine.train(True)


def whole_weights_fit(engine: Engine) -> bool:
    needed = sum(full_count(parameter) * parameter.element_size() for parameter in engine.module.parameters())
    free = accelerator.memory()[0] if engine.device.type != "cpu" else available_bytes()
    return 2 * needed < free
