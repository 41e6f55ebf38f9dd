"""`zero.stage=auto`: the stage of a run, chosen by the plan when the run begins."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from dstune.config.parallel_rules import ranks_problem
from dstune.config.precision import FIRST_BF16, automatic
from dstune.config.schema import Automatic, Precision, RunConfig
from dstune.config.validate import TILED, allowed_stages, at_stage, tiles_problem
from dstune.core.errors import UserError
from dstune.core.rank_env import from_environment
from dstune.launch import machine
from dstune.planning import architecture, source
from dstune.planning.calibration import speeds
from dstune.planning.hardware import Cluster, Device
from dstune.planning.plan import Choice, cheapest_stage
from dstune.planning.setup import Setup, head_of, labels_of, setup
from dstune.planning.time import Speed, speed_of
from dstune.protocols import launcher_of, parallelism_of


def choose(config: RunConfig, env: Mapping[str, str] | None = None) -> tuple[RunConfig, str]:
    """`config` with a stage in place of `auto`, for this machine or the launch that it is in, and why this one."""
    try:
        cluster = free_cluster(config, env)
        if cluster is not None:
            measured = speeds(cluster.per_node, on_gpu=cluster.device.gpu) if cluster.nodes == 1 else None
            return choose_on(config, cluster, measured)
        why = "the machines of the ranks are not known here"
    except UserError:  # an architecture that the planner does not know, processes that others refuse
        why = "the plan does not know this model"
    stage = max(allowed_stages(config))
    return at_stage(config, stage), f"{why}, and of the stages that are allowed this takes the least memory"


def choose_on(config: RunConfig, cluster: Cluster, measured: dict[int, Speed] | None = None) -> tuple[RunConfig, str]:
    """The same on `cluster`. measured: as for `plan.planned`. Raises UserError where the plan does not know the model."""
    stages = allowed_stages(config)
    if len(stages) == 1:
        return at_stage(config, stages[0]), "other settings allow no other stage"
    configured, _, _ = setup_on(at_stage(config, stages[-1]), cluster)
    best, compared = cheapest_stage(configured, cluster, all_speeds(cluster, measured), stages)
    return at_stage(config, best.setup.stage), _reason(best, compared, cluster)


def _reason(best: Choice, compared: Sequence[Choice], cluster: Cluster) -> str:
    takes = f"{best.memory_gib:.1f} of {cluster.device.memory_gib:.1f} GiB a rank"
    if not best.fits:
        return f"none fits by the plan, and this takes the least memory ({takes})"
    fitting = [str(choice.setup.stage) for choice in compared if choice.fits]
    if len(fitting) == 1:
        return f"the only stage that fits by the plan ({takes})"
    fit = f"of the stages that fit by the plan, which are {', '.join(fitting)}"
    if best.time.seconds > min(choice.time.seconds for choice in compared if choice.fits):
        return f"about as fast as any {fit}, and with more room ({takes})"
    return f"the fastest {fit} ({takes})"


def free_cluster(config: RunConfig, env: Mapping[str, str] | None = None) -> Cluster | None:
    """The ranks of a run that starts here, with the memory that is free now; None where they are on other machines.

    Raises UserError for more processes than GPUs.
    """
    launch = from_environment(os.environ if env is None else env)
    if launch is None and not launcher_of(config.launch).here:
        return None
    found = machine.here(config, env, launch.local_size if launch else None)
    cluster = found.cluster
    if launch is not None:  # somebody else's launch: as many ranks, this node's devices
        nodes = max(1, launch.world_size // launch.local_size)
        cluster = replace(cluster, per_node=launch.local_size, nodes=nodes)
    return replace(cluster, device=replace(cluster.device, memory_gib=found.free_gib))


def setup_on(config: RunConfig, cluster: Cluster) -> tuple[Setup, Precision, architecture.Architecture]:
    """What memory and time of a run depend on, its precision, and the whole model.

    Raises UserError where the model's architecture is not known, or cannot be trained so.
    """
    values: dict[str, Any] = source.config_json(config.model)
    model = architecture.architecture(values, head_of(config), labels_of(config))
    parallel = parallelism_of(config.parallel)
    problems = parallel.architecture_problems(model, architecture.DEFAULTS.get(model.kind, {}) | values)
    if problem := ranks_problem(cluster.ranks, parallel.size):
        problems.append(problem)
    if problems:
        raise UserError(problems)
    if config.trainer.mlp_tiles > 1 and not any(TILED[0] in tensor.name for tensor in model.tensors):
        raise UserError(tiles_problem(model.kind, config.trainer.mlp_tiles))
    on_gpu = cluster.device.gpu
    precision = resolved_precision(config, cluster.device)
    found = setup(
        config,
        model,
        ranks=cluster.ranks,
        ranks_per_node=cluster.per_node,
        on_gpu=on_gpu,
        precision=precision,
        values=values,
    )
    return found, precision, model


def all_speeds(cluster: Cluster, measured: dict[int, Speed] | None) -> dict[int, Speed]:
    """By the bytes of a weight: what was measured, else the hardware table's."""
    return {size: speed_of(cluster, size) for size in (2, 4)} | (measured or {})


def resolved_precision(config: RunConfig, device: Device) -> Precision:
    """What the ranks will compute in on `device`."""
    requested = config.trainer.precision
    if requested is not Precision.auto:
        return requested
    capability = device.capability
    # A GPU of which nothing is known has bf16, as all of the table do.
    fast = capability is None or capability >= FIRST_BF16 if device.gpu else machine.fast_bf16()
    return automatic(config, fast_bf16=fast, capability=capability)


def is_open(config: RunConfig) -> bool:
    """Whether no stage is chosen yet."""
    return config.zero.stage is Automatic.auto
