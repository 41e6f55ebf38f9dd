"""`zero.stage=auto` in the launching process: for ranks on this machine, or on others that its launcher reaches."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace

from dstune.config.schema import RunConfig
from dstune.config.validate import allowed_stages, at_stage
from dstune.core.errors import UserError
from dstune.core.rank_env import from_environment
from dstune.launch import machine
from dstune.planning import hardware
from dstune.planning.calibration import speeds
from dstune.planning.hardware import Cluster
from dstune.planning.stage import choose_stage
from dstune.protocols import launcher_of

LATER = "the first node chooses when the ranks start (launch.hardware=8xH100 decides it now)"


def choose(config: RunConfig, env: Mapping[str, str] | None = None) -> tuple[RunConfig, str]:
    """Return `config` with a stage instead of `auto`, and the reason.

    The ranks may run on machines that are unknown here. Then the stage stays open: the first rank chooses it
    (`dstune/rank/stage.py`), except where a single stage is allowed.
    """
    stages = allowed_stages(config)
    if len(stages) == 1:
        return at_stage(config, stages[0]), "other settings allow no other stage"
    cluster = named_cluster(config)
    measured = None
    if cluster is None:
        try:
            cluster = free_cluster(config, env)
        except UserError:  # processes that others refuse
            return at_stage(
                config, max(stages)
            ), "the machine of the ranks is not known, and this takes the least memory"
        if cluster is None:
            return config, LATER
        measured = speeds(cluster.per_node, on_gpu=cluster.device.gpu) if cluster.nodes == 1 else None
    return choose_stage(config, cluster, measured)


def named_cluster(config: RunConfig) -> Cluster | None:
    """Return the machines that `launch.hardware` describes; None if it is unset. Raises UserError for unknown hardware."""
    if config.launch.hardware is None:
        return None
    launcher = launcher_of(config.launch)
    cluster = hardware.parse(config.launch.hardware, {}, launcher.nodes(), "launch.hardware")
    return cluster if launcher.ranks is None else replace(cluster, per_node=max(1, launcher.ranks // cluster.nodes))


def free_cluster(config: RunConfig, env: Mapping[str, str] | None = None) -> Cluster | None:
    """Return the ranks of a run that starts here, with the memory that is free now; None where they are on other machines.

    Raises UserError for more processes than GPUs.
    """
    launch = from_environment(os.environ if env is None else env)
    if launch is None and not launcher_of(config.launch).here:
        return None
    local = machine.here(config, env, launch.local_size if launch else None)
    cluster = local.cluster
    if launch is not None:  # somebody else's launch: as many ranks, this node's devices
        nodes = max(1, launch.world_size // launch.local_size)
        cluster = replace(cluster, per_node=launch.local_size, nodes=nodes)
    return replace(cluster, device=replace(cluster.device, memory_gib=local.free_gib))
