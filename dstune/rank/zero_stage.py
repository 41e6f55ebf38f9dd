"""Chooses the stage for `zero.stage=auto` on the first rank, if the launching machine did not have the ranks' hardware."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from dstune.checkpoint import store
from dstune.config.schema import RunConfig
from dstune.config.validate import allowed_stages, at_stage
from dstune.core.distributed import World
from dstune.planning.hardware import DEVICES, GIB, Cluster, Device, known_device
from dstune.planning.host import available_bytes
from dstune.planning.stage import choose_stage, is_open
from dstune.tracking.console import Console
from dstune.zero import accelerator


def choose_zero_stage(config: RunConfig, run_dir: Path, world: World) -> RunConfig:
    """Return `config` with a stage in place of `auto`, the same on all ranks; rank 0 prints the reason.

    A run that continues on the same number of ranks keeps the stage of its checkpoint: only at that stage does it continue to
    the bit. Every rank calls this before the engine is built.
    """
    if not is_open(config):
        return config
    choice: tuple[int, bool, str] | None = _choose(config, run_dir, world) if world.is_main else None
    choice = world.broadcast(choice)
    assert choice is not None
    stage, hpz, reason = choice
    if world.is_main:
        Console().message(f"zero.stage={stage}{' zero.hpz=true' if hpz else ''}: {reason}")
    config = at_stage(config, stage)
    return replace(config, zero=replace(config.zero, hpz=hpz))


def _choose(config: RunConfig, run_dir: Path, world: World) -> tuple[int, bool, str]:
    stages = allowed_stages(config)
    checkpoint = store.resumable(run_dir)
    chosen, reason = choose_stage(config, cluster_of(world))
    assert isinstance(chosen.zero.stage, int)
    if checkpoint is not None:
        saved = store.read_state(checkpoint)
        if saved["world_size"] == world.size and saved["zero_stage"] in stages:
            hpz = chosen.zero.hpz and chosen.zero.stage == saved["zero_stage"]
            return saved["zero_stage"], hpz, f"the stage of {checkpoint.name}, which continues"
    return chosen.zero.stage, chosen.zero.hpz, reason


def cluster_of(world: World) -> Cluster:
    """Describe the cluster of `world` by this rank's device and its free memory."""
    nodes = max(1, world.size // world.local_size)
    host_gib = available_bytes() / GIB
    if not accelerator.present():
        device = replace(DEVICES["CPU"], memory_gib=host_gib / world.local_size)
        return Cluster(device, world.local_size, nodes, known=False, host_gib=host_gib)
    name = accelerator.name()
    published_device = known_device(name)
    free, total = (size / GIB for size in accelerator.memory(accelerator.current()))
    device = published_device or Device(name, total, 100, 1000, 32, 12.5)
    device = replace(device, memory_gib=free, capability=accelerator.capability())
    return Cluster(device, world.local_size, nodes, known=published_device is not None, host_gib=host_gib)
