"""From a `RunConfig` to the command line and environment of a launcher that starts ranks on several nodes: pure
functions.
"""

from __future__ import annotations

import re
import secrets
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dstune.config.launch_schema import HostfileConfig, OpenMpiConfig
from dstune.config.schema import RunConfig
from dstune.handed import FOLDER, HANDED, LAUNCH_ID, RANK_LOGS
from dstune.launch.commands import (
    ALWAYS,
    UNLESS_SET,
    inherited,
    interface_variables,
    is_tracker_key,
    python_path,
    referenced,
)
from dstune.launch.hosts import Ssh
from dstune.redact import is_secret

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
"""What another machine has its own of."""
PLAIN = re.compile(r"[^\"$`\\\n\r]*")
"""Values that survive the quotes which DeepSpeed's launcher puts around them on its way through two shells."""


@dataclass(frozen=True)
class RemotePlan:
    """A launcher's command line, and what its ranks get."""

    argv: tuple[str, ...]
    env: dict[str, str]
    """Of the launcher itself."""
    files: dict[str, str]
    """Files that it reads, by name; they go into `RUN/launch`, where it is started."""
    handed: dict[str, dict[str, str]]
    """Variables that no command line may show: `all`, and `first` for rank 0; `file` has the name of what keeps them."""
    slots: dict[str, list[int]]
    """The slots that run a rank, by host."""

    @property
    def size(self) -> int:
        return sum(len(own) for own in self.slots.values())


def ssh_of(launch: HostfileConfig | OpenMpiConfig) -> Ssh:
    return Ssh(launch.user, launch.port)


def variables_of(config: RunConfig, run_dir: Path, launch_id: str, parent: Mapping[str, str]) -> tuple[dict, dict]:
    """What every rank gets, apart by how: (shown on command lines, handed over unseen).

    Raises:
        UserError: an unset variable in `launch.export_env`.
    """
    launch = config.launch
    assert isinstance(launch, (HostfileConfig, OpenMpiConfig))
    given = {
        name: value for name, value in inherited(config, parent).items() if _travels(name, value, launch.export_env)
    }
    unseen = referenced(config, parent)  # run.yaml keeps only their names too
    shown = {name: value for name, value in UNLESS_SET.items() if name not in given}
    shown |= {
        "OMP_NUM_THREADS": "1"
    }  # how many cores the nodes have is theirs to say: launch.export_env, or their shells
    if python := python_path(given.get("PYTHONPATH", "")):
        given["PYTHONPATH"] = python
    handed: dict[str, dict[str, str]] = {"all": {}, "first": {}}
    for name, value in given.items():
        if is_tracker_key(name) and name not in launch.export_env:
            handed["first"][name] = value
        elif is_secret(name, value) or name in unseen or not PLAIN.fullmatch(value):
            handed["all"][name] = value
        else:
            shown[name] = value
    shown |= {**ALWAYS, **interface_variables(launch.interface)}
    shown |= {LAUNCH_ID: launch_id, RANK_LOGS: "1", FOLDER: str(Path.cwd()), "DSTUNE_CONSOLE": "plain"}
    handed = {kind: values for kind, values in handed.items() if values}
    if handed:
        shown[HANDED] = secrets.token_hex(16)
        handed["file"] = {"name": shown[HANDED]}
    return shown, handed


def _travels(name: str, value: str, asked: list[str]) -> bool:
    if name in asked:
        return True
    # An empty list of GPUs asks for the CPU, on every node.
    return name not in OF_THIS_MACHINE or (name == "CUDA_VISIBLE_DEVICES" and not value)


def pdsh_plan(
    config: RunConfig,
    run_dir: Path,
    slots: dict[str, list[int]],
    *,
    launch_id: str,
    parent: Mapping[str, str],
    address: str,
    port: int,
    on_cpu: bool,
) -> RemotePlan:
    """DeepSpeed's launcher over pdsh. address, port: where the ranks meet. on_cpu: the nodes have no GPU."""
    launch = config.launch
    assert isinstance(launch, HostfileConfig) and launch.hostfile is not None
    shown, handed = variables_of(config, run_dir, launch_id, parent)
    if on_cpu:
        shown.setdefault("DS_ACCELERATOR", "cpu")
    shown["PATH"] = f"{Path(sys.executable).parent}:{parent.get('PATH', '/usr/bin:/bin')}"
    argv = [
        *(sys.executable, "-u", "-m", "deepspeed.launcher.runner"),
        f"--hostfile={Path(launch.hostfile).absolute()}",
        *([f"--include={launch.include}"] if launch.include else []),
        *([f"--exclude={launch.exclude}"] if launch.exclude else []),
        *("--launcher=pdsh", "--force_multi", "--no_ssh_check"),
        f"--master_addr={address}",
        f"--master_port={port}",
        *([f"--ssh_port={launch.port}"] if launch.port else []),
        *([f"--launcher_args=-l {launch.user}"] if launch.user else []),
        *("--no_local_rank", "--module", "dstune.worker", str(run_dir.absolute())),
    ]
    # The runner puts variables of its own that begin with NCCL, PYTHON and the like on pdsh's command line.
    own = {name: value for name, value in shown.items() if not name.startswith("DSTUNE_")}
    own |= {name: parent[name] for name in ("HOME", "USER", "SSH_AUTH_SOCK") if name in parent}
    own["PDSH_SSH_ARGS_APPEND"] = (
        "-o BatchMode=yes -o ConnectTimeout=10 -o ServerAliveInterval=5 -o ServerAliveCountMax=3"
    )
    # No blank lines and no comments: either is an error to DeepSpeed.
    listing = "".join(f"{name}={value}\n" for name, value in sorted(shown.items()) if value)
    return RemotePlan(tuple(argv), own, {".deepspeed_env": listing}, handed, slots)


def mpirun_plan(
    config: RunConfig,
    run_dir: Path,
    slots: dict[str, list[int]],
    *,
    launch_id: str,
    parent: Mapping[str, str],
    program: str,
    as_root: bool,
    on_cpu: bool,
) -> RemotePlan:
    """Open MPI's mpirun. slots: by host; a single `localhost` starts no ssh. program: the path of mpirun."""
    launch = config.launch
    assert isinstance(launch, OpenMpiConfig)
    shown, handed = variables_of(config, run_dir, launch_id, parent)
    if on_cpu:
        shown.setdefault("DS_ACCELERATOR", "cpu")
    size = sum(len(own) for own in slots.values())
    hosts = ",".join(f"{host}:{len(own)}" for host, own in slots.items())
    agent = shlex.join(["ssh", *ssh_of(launch).options()])
    argv = [
        *(program, "-n", str(size), "--host", hosts),
        *("--map-by", "slot", "--bind-to", "none", "--oversubscribe"),
        *("--mca", "plm_ssh_agent", agent, "--prtemca", "plm_ssh_agent", agent),
        *(["--mca", "btl_tcp_if_include", launch.interface] if launch.interface else []),
        *(["--prtemca", "prte_if_include", launch.interface] if launch.interface else []),
        *launch.mpirun_options,
        *[word for name in sorted(shown) for word in ("-x", name)],  # names alone: values are in mpirun's environment
        *(sys.executable, "-u", "-m", "dstune.worker", str(run_dir.absolute())),
    ]
    env = {name: value for name, value in parent.items() if name in ("HOME", "USER", "SSH_AUTH_SOCK", "TMPDIR")}
    env |= shown
    env["PATH"] = f"{Path(sys.executable).parent}:{parent.get('PATH', '/usr/bin:/bin')}"
    if as_root:
        env |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    return RemotePlan(tuple(argv), env, {}, handed, slots)
