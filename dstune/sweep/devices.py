"""Divides the GPUs and CPU cores of this machine among the trials that run at the same time."""

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
    """The part of the machine that one trial at a time has to itself."""

    label: str
    env: Mapping[str, str] = field(default_factory=dict)
    """Variables of its processes that differ from those of the sweep."""
    cores: tuple[int, ...] = ()
    """Numbers of its CPU cores; empty for all cores."""


@dataclass(frozen=True)
class Devices:
    """The GPUs and cores to divide."""

    gpus: tuple[str, ...]
    """As CUDA_VISIBLE_DEVICES names them."""
    cores: tuple[int, ...]


def here(env: Mapping[str, str] | None = None) -> Devices:
    """Return the devices of this machine that this process may use."""
    env = os.environ if env is None else env
    count = count_gpus(env)
    visible = env.get("CUDA_VISIBLE_DEVICES")
    names = map(str, range(count)) if visible is None else (name.strip() for name in visible.split(","))
    allowed = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    # A container may see more cores than its CPU quota lets it use at a time.
    return Devices(tuple(names)[:count], tuple(allowed)[: count_cores()])


def slots(config: RunConfig, devices: Devices, ranks: Sequence[int | None] = (None,)) -> list[Slot]:
    """Return `sweep.parallel` slots. ranks: every value of `launch.processes` among the trials.

    Raises:
        UserError: there are fewer GPUs, or cores, than the trials need at a time.
    """
    parallel, host = config.sweep.parallel, socket.gethostname()
    launcher = launcher_of(config.launch)
    if launcher.queue is not None:
        return [Slot(launcher.queue.name)] * parallel
    if parallel == 1 or not launcher.here:
        return [Slot(host)] * parallel
    kind, count = ("GPU", len(devices.gpus)) if devices.gpus else ("core", len(devices.cores))
    most_ranks = max((processes for processes in ranks if processes is not None), default=None)
    per_slot = most_ranks if most_ranks is not None and devices.gpus else max(1, count // parallel)
    if parallel * per_slot > count:
        needs = f" of {per_slot} {kind}s" if per_slot > 1 else ""
        reason = f"{parallel} trials{needs} at a time do not fit on the {count} {kind}{'s' * (count != 1)} here"
        most_slots = count // per_slot
        fix = f"sweep.parallel={most_slots}" if most_slots else f"launch.processes={count} with sweep.parallel=1"
        raise UserError(Problem("sweep.parallel", reason, fix, str(parallel)))
    slot_list = []
    for number in range(parallel):
        cores = share(devices.cores, number, parallel)
        if not devices.gpus:
            label = f"{host}, core{'s' * (len(cores) > 1)} {','.join(map(str, cores))}"
            slot_list.append(Slot(label, cores=cores))
            continue
        slot_gpus = devices.gpus[number * per_slot : (number + 1) * per_slot]
        label = f"{host}, GPU {','.join(slot_gpus)}"
        slot_list.append(Slot(label, {"CUDA_VISIBLE_DEVICES": ",".join(slot_gpus)}, cores))
    return slot_list


def share(cores: Sequence[int], number: int, parallel: int) -> tuple[int, ...]:
    """Return the cores of slot `number`, in shares that differ by one core at most; empty (all cores) if there are too few to
    divide."""
    if len(cores) < parallel:
        return ()
    first, remainder = divmod(len(cores), parallel)
    start = number * first + min(number, remainder)
    return tuple(cores[start : start + first + (number < remainder)])
