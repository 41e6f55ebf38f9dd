"""Checks the keys of `launch=slurm`, each by itself and together."""

from __future__ import annotations

import re
from collections.abc import Iterator

from dstune.config.convert import format_value
from dstune.config.launch_rules import quote_problems
from dstune.core.errors import Problem
from dstune.launch.agents.rules import check_agents, check_nodes
from dstune.launch.slurm.config import SlurmConfig

TIME = re.compile(r"(\d+-\d+(:\d+){0,2}|\d+(:\d+){0,2}|UNLIMITED|INFINITE)")
"""sbatch's own forms: minutes, minutes:seconds, hours:minutes:seconds, days-hours and so on."""
OWNED = {
    "nodes": "launch.nodes",
    "ntasks-per-node": "launch.processes",
    "no-kill": "launch.min_nodes",
    "ntasks": "launch.processes",
    "gres": "launch.gpus",
    "cpus-per-task": "launch.cpus",
    "mem": "launch.memory",
    "partition": "launch.partition",
    "account": "launch.account",
    "qos": "launch.qos",
    "constraint": "launch.constraint",
    "time": "launch.time",
    "signal": "launch.signal_seconds",
    "requeue": "launch.requeue",
    "no-requeue": "launch.requeue",
    "export": "launch.export_env",
    "job-name": "run.name",
    "output": "run.dir",
    "dependency": "launch.chain",
    "array": "sweeps",
}
"""Options of sbatch that the script sets itself, and what decides them."""
SRUN_OWNED = {
    *("nodes", "ntasks", "ntasks-per-node", "ntasks-per-gpu", "cpus-per-task", "gpus-per-task", "gpu-bind"),
    *("kill-on-bad-exit", "wait", "output", "error"),
}
"""Options of srun that the script sets itself, or that would give an agent only a part of its node."""


def check(launch: SlurmConfig) -> Iterator[Problem]:
    """Yield everything that is wrong with the keys of `launch`."""
    for key in ("partition", "account", "qos", "constraint", "memory", "time"):
        yield from quote_problems(f"launch.{key}", getattr(launch, key) or "")
    if launch.gpus and launch.processes and launch.processes > launch.gpus:
        reason = f"every rank needs a GPU of its own, and launch.gpus={launch.gpus}"
        yield Problem("launch.processes", reason, f"launch.processes={launch.gpus}", str(launch.processes))
    yield from check_agents(launch)
    yield from check_nodes(launch, launch.nodes, "launch.nodes")
    if launch.chain > 1 and launch.requeue:
        reason = "a chain is only for clusters that forbid requeueing; a requeued job continues without one"
        yield Problem("launch.chain", reason, "add launch.requeue=false, or set launch.chain=1", str(launch.chain))
    if launch.time is not None and not TIME.fullmatch(launch.time):
        fix = "minutes, H:MM:SS, or D-HH:MM:SS"
        yield Problem("launch.time", "sbatch does not accept this as a time", fix, format_value(launch.time))
    for text in launch.directives:
        name = text.removeprefix("--").partition("=")[0].split(" ")[0]
        if not re.fullmatch(r"--[a-z][a-z-]*(=[^\n]*)?", text):
            reason = "an option of sbatch is --NAME or --NAME=VALUE"
            yield Problem("launch.directives", reason, "for example [--exclusive]", format_value(text))
        elif name in OWNED:
            yield Problem("launch.directives", f"{OWNED[name]} decides this", "leave it out here", format_value(text))
    for text in launch.srun_options:
        name = text.removeprefix("--").partition("=")[0].split(" ")[0]
        if name in SRUN_OWNED:
            reason = "srun starts only one agent per node, and the agent starts the ranks"
            fix = "leave it out; launch.processes, launch.gpus and launch.cpus decide about ranks"
            yield Problem("launch.srun_options", reason, fix, format_value(text))
    for key in ("partition", "account", "qos", "constraint", "memory", "container", "interface"):
        value = getattr(launch, key)
        if value is not None and (not value.strip() or "\n" in value):
            yield Problem(
                f"launch.{key}",
                "this is empty or has several lines",
                "give a name, or leave it out",
                format_value(value),
            )
    if launch.container_mounts and launch.container is None:
        reason = "there is no container"
        fix = "launch.container=IMAGE, or leave it out"
        yield Problem("launch.container_mounts", reason, fix, format_value(launch.container_mounts))
