"""How the trials that run at the same time share this machine."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from dstune.config.schema import RunConfig
from dstune.core.errors import Problem, UserError
from dstune.launch.commands import count_cores, count_gpus
from dstune.protocols import launcher_of


@dataclass(frozen=True)
class Slot:
    """What one trial at a time has to itself."""

    label: str
    env: Mapping[str, str] = field(default_factory=dict)
    """Variables of its processes that differ from those of the sweep."""
    cores: tuple[int, ...] = ()
    """Numbers of its CPU cores; all when empty."""


@dataclass(frozen=True)
class Devices:
    """What there is to share."""

    gpus: tuple[str, ...]
    """As CUDA_VISIBLE_DEVICES names them."""
    cores: tuple[int, ...]


def here(env: Mapping[str, str] | None = None) -> Devices:
    env = os.environ if env is None else env
    count = count_gpus(env)
    visible = env.get("CUDA_VISIBLE_DEVICES")
    names = map(str, range(count)) if visible is None else (name.strip() for name in visible.split(","))
    allowed = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    # A container may have a share of more cores than it may use at a time.
    return Devices(tuple(names)[:count], tuple(allowed)[: count_cores()])


def slots(config: RunConfig, devices: Devices, ranks: Sequence[int | None] = (None,)) -> list[Slot]:
    """Return a slot for each of the `sweep.parallel` trials. ranks: every `launch.processes` that some trial has.

    Raises:
        UserError: there are fewer GPUs, or cores, than the trials need at a time.
    """
    parallel, host = config.sweep.parallel, socket.gethostname()
    launcher = launcher_of(config.launch)
    if launcher.queue is not None:
        return [Slot(launcher.queue.name)] * parallel
    if parallel == 1 or not launcher.here:
        return [Slot(host)] * parallel
    kind, things = ("GPU", devices.gpus) if devices.gpus else ("core", devices.cores)
    most_ranks = max((count for count in ranks if count is not None), default=None)
    each = most_ranks if most_ranks is not None and devices.gpus else max(1, len(things) // parallel)
    if parallel * each > len(things):
        needs = f" of {each} {kind}s" if each > 1 else ""
        reason = (
            f"{parallel} trials{needs} at a time do not fit on the {len(things)} {kind}{'s' * (len(things) != 1)} here"
        )
        fits = len(things) // each
        fix = f"sweep.parallel={fits}" if fits else f"launch.processes={len(things)} with sweep.parallel=1"
        raise UserError(Problem("sweep.parallel", reason, fix, str(parallel)))
    slot_list = []
    for number in range(parallel):
        cores = share(devices.cores, number, parallel)
        if not devices.gpus:
            label = f"{host}, core{'s' * (len(cores) > 1)} {','.join(map(str, cores))}"
            slot_list.append(Slot(label, cores=cores))
            continue
        slot_gpus = devices.gpus[number * each : (number + 1) * each]
        label = f"{host}, GPU {','.join(slot_gpus)}"
        slot_list.append(Slot(label, {"CUDA_VISIBLE_DEVICES": ",".join(slot_gpus)}, cores))
    return slot_list


def share(cores: Sequence[int], number: int, parallel: int) -> tuple[int, ...]:
    """Return the cores of slot `number`, as equal as it goes; all of them where there are too few to divide."""
    if len(cores) < parallel:
        return ()
    first, remainder = divmod(len(cores), parallel)
    start = number * first + min(number, remainder)
    return tuple(cores[start : start + first + (number < remainder)])
