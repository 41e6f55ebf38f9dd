"""Rules of `launch`: what its keys may say, and what fits together among them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import fields

from dstune.config.convert import shown
from dstune.config.launch_schema import HostfileConfig, OpenMpiConfig, SlurmConfig
from dstune.config.schema import RunConfig
from dstune.errors import Problem

TIME = re.compile(r"(\d+-\d+(:\d+){0,2}|\d+(:\d+){0,2}|UNLIMITED|INFINITE)")
"""sbatch's own forms: minutes, minutes:seconds, hours:minutes:seconds, days-hours and so on."""
OWNED = {
    "nodes": "launch.nodes",
    "ntasks-per-node": "launch.processes",
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


def check_launch(config: RunConfig) -> Iterator[Problem]:
    launch = config.launch
    for name in launch.export_env:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            # A value would be on every rank's command line; the name is enough, and no secret is repeated here.
            fix = (
                "name the variable only; its value is that of this process" if "=" in name else "letters, digits and _"
            )
            yield Problem("launch.export_env", "this is no name of an environment variable", fix, name.split("=")[0])
    yield from _check_characters(config)
    if isinstance(launch, SlurmConfig):
        yield from _check_slurm(launch)
    if isinstance(launch, (HostfileConfig, OpenMpiConfig)):
        yield from _check_hosts(launch)


CONTROL = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")
QUOTED = ("partition", "account", "qos", "constraint", "memory", "time", "interface")
"""Keys of `launch` whose value stands between quotes in a line of options."""


def _check_characters(config: RunConfig) -> Iterator[Problem]:
    """Values reach scripts, option lines and other machines' shells: a line break in one would be a line of its own there."""
    values: list[tuple[str, str]] = [("run.dir", config.run.dir or ""), ("run.name", config.run.name)]
    for field in fields(config.launch):
        value = getattr(config.launch, field.name)
        texts = value if isinstance(value, list) else [value]
        values += [(f"launch.{field.name}", text) for text in texts if isinstance(text, str)]
    for key, text in values:
        if CONTROL.search(text):
            yield Problem(key, "it has a line break or another control character in it", "leave that out", text)
        elif key.removeprefix("launch.") in QUOTED and re.search(r"[\"'`\\]", text):
            yield Problem(key, "it has a quote or a backslash in it", "leave that out", text)


def _check_hosts(launch: HostfileConfig | OpenMpiConfig) -> Iterator[Problem]:
    if isinstance(launch, HostfileConfig) and not (launch.hostfile or "").strip():
        fix = "launch.hostfile=hosts, with one `HOST slots=N` a line (launch/hostfile.example)"
        yield Problem("launch.hostfile", "there is no list of hosts", fix, shown(launch.hostfile))
    if launch.include and launch.exclude:
        yield Problem(
            "launch.exclude", "it cannot stand beside launch.include", "leave one of them out", launch.exclude
        )
    if isinstance(launch, OpenMpiConfig) and launch.hostfile is None:
        for key in ("include", "exclude", "user", "port"):
            if getattr(launch, key) is not None:
                reason = "there is no hostfile whose hosts it could be about"
                yield Problem(
                    f"launch.{key}", reason, "launch.hostfile=hosts, or leave it out", shown(getattr(launch, key))
                )
    if isinstance(launch, OpenMpiConfig) and launch.hostfile is not None and launch.processes is not None:
        reason = "the slots of the hostfile are the ranks"
        yield Problem("launch.processes", reason, "leave it out, or change the slots", shown(launch.processes))


def _check_slurm(launch: SlurmConfig) -> Iterator[Problem]:
    if launch.gpus and launch.processes and launch.processes > launch.gpus:
        reason = f"every rank needs a GPU of its own, and launch.gpus={launch.gpus}"
        yield Problem("launch.processes", reason, f"launch.processes={launch.gpus}", str(launch.processes))
    if launch.chain > 1 and launch.requeue:
        reason = "a chain is for clusters that forbid requeueing: a job that is requeued continues by itself"
        yield Problem("launch.chain", reason, "launch.requeue=false with it, or launch.chain=1", str(launch.chain))
    if launch.time is not None and not TIME.fullmatch(launch.time):
        fix = "minutes, H:MM:SS, or D-HH:MM:SS"
        yield Problem("launch.time", "sbatch has no such form of a time", fix, shown(launch.time))
    for text in launch.directives:
        name = text.removeprefix("--").partition("=")[0].split(" ")[0]
        if not re.fullmatch(r"--[a-z][a-z-]*(=[^\n]*)?", text):
            reason = "an option of sbatch is --NAME or --NAME=VALUE"
            yield Problem("launch.directives", reason, "for example [--exclusive]", shown(text))
        elif name in OWNED:
            yield Problem("launch.directives", f"{OWNED[name]} decides this", "leave it out here", shown(text))
    for key in ("partition", "account", "qos", "constraint", "memory", "container", "interface"):
        value = getattr(launch, key)
        if value is not None and (not value.strip() or "\n" in value):
            yield Problem(
                f"launch.{key}", "this is empty or has several lines", "give a name, or leave it out", shown(value)
            )
    if launch.container_mounts and launch.container is None:
        reason = "there is no container"
        fix = "launch.container=IMAGE, or leave it out"
        yield Problem("launch.container_mounts", reason, fix, shown(launch.container_mounts))
