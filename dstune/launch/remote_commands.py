"""Pure functions from a run to the variables of its ranks on several nodes."""

from __future__ import annotations

import re
import secrets
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from dstune.config.run_file import variables_for_ranks
from dstune.config.schema import RunConfig
from dstune.core.child_python import python_path
from dstune.core.handoff import FOLDER, HANDOFF_FILE, RANK_LOGS
from dstune.core.rank_env import GROUP_SECRET, LAUNCH_ID
from dstune.core.secrets import is_secret
from dstune.launch.commands import (
    ALWAYS,
    UNLESS_SET,
    inherited,
    interface_variables,
    is_tracker_key,
    referenced,
)
from dstune.launch.hosts import Ssh
from dstune.launch.on_hosts_config import OnHostsConfig

OF_THIS_MACHINE = {
    "HOME",
    "USER",
    "LOGNAME",
    "SHELL",
    "TMPDIR",
    "TMP",
    "TEMP",
    "XDG_RUNTIME_DIR",
    "CUDA_VISIBLE_DEVICES",
}
"""Variables that do not travel, because every machine has its own."""
PLAIN = re.compile(r"[^\"$`\\\n\r]*")
"""Values that no shell between a launcher and its ranks can change."""


@dataclass(frozen=True)
class RemotePlan:
    """A launcher's command line and environment, and the variables and slots of its ranks."""

    argv: tuple[str, ...]
    env: dict[str, str]
    """Environment of the launcher itself."""
    handoff: dict[str, dict[str, str]]
    """Variables that no command line may show: `all` for every rank, `first` for rank 0; `file` holds the name of their file."""
    slots: dict[str, list[int]]
    """The slots that run a rank, by host."""

    @property
    def size(self) -> int:
        return sum(len(host_slots) for host_slots in self.slots.values())


class HasInterface(Protocol):
    """The keys that `variables_of` needs of a launcher's configuration."""

    @property
    def export_env(self) -> list[str]: ...
    @property
    def interface(self) -> str | None: ...


def ssh_of(launch: OnHostsConfig) -> Ssh:
    return Ssh(launch.user, launch.port)


def path_of(parent: Mapping[str, str]) -> str:
    """Return `PATH` with the folder of this Python interpreter in front."""
    return f"{Path(sys.executable).parent}:{parent.get('PATH', '/usr/bin:/bin')}"


def variables_of(
    config: RunConfig, run_dir: Path, launch: HasInterface, launch_id: str, parent: Mapping[str, str], *, on_cpu: bool
) -> tuple[dict, dict]:
    """Return the variables of every rank: (those that command lines may show, those in the handoff). on_cpu: the nodes have no GPU.

    Raises:
        UserError: an unset variable in `launch.export_env`.
    """
    variables = {
        name: value for name, value in inherited(config, parent).items() if _travels(name, value, launch.export_env)
    }
    referenced_names = referenced(config, parent)  # run.yaml keeps only their names too
    visible_variables = {name: value for name, value in UNLESS_SET.items() if name not in variables}
    # The cores of the nodes are not known here; launch.export_env, or the nodes' shells, can set more.
    visible_variables |= {"OMP_NUM_THREADS": "1"}
    if python := python_path(variables.get("PYTHONPATH", "")):
        variables["PYTHONPATH"] = python
    handoff: dict[str, dict[str, str]] = {"all": {}, "first": {}}
    for name, value in variables.items():
        if is_tracker_key(name) and name not in launch.export_env:
            handoff["first"][name] = value
        elif is_secret(name, value) or name in referenced_names or not PLAIN.fullmatch(value):
            handoff["all"][name] = value
        else:
            visible_variables[name] = value
    visible_variables |= {**ALWAYS, **interface_variables(launch.interface)}
    visible_variables |= variables_for_ranks(run_dir)
    visible_variables |= {LAUNCH_ID: launch_id, RANK_LOGS: "1", FOLDER: str(Path.cwd()), "DSTUNE_CONSOLE": "plain"}
    if on_cpu:
        visible_variables.setdefault("DS_ACCELERATOR", "cpu")
    handoff["all"][GROUP_SECRET] = secrets.token_hex(32)
    visible_variables[HANDOFF_FILE] = secrets.token_hex(16)
    handoff["file"] = {"name": visible_variables[HANDOFF_FILE]}
    return visible_variables, {kind: values for kind, values in handoff.items() if values}


def _travels(name: str, value: str, requested: list[str]) -> bool:
    if name in requested:
        return True
    # An empty list of GPUs asks for the CPU, on every node.
    return name not in OF_THIS_MACHINE or (name == "CUDA_VISIBLE_DEVICES" and not value)
