"""DeepSpeed's launcher over pdsh: its command line and environment, a pure function."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

from dstune.config.schema import RunConfig
from dstune.launch.hostfile.config import HostfileConfig
from dstune.launch.remote_commands import RemotePlan, path_of, variables_of


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
    formatted, handoff = variables_of(config, run_dir, launch, launch_id, parent, on_cpu=on_cpu)
    formatted["PATH"] = path_of(parent)
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
    own = {name: value for name, value in formatted.items() if not name.startswith("DSTUNE_")}
    own |= {name: parent[name] for name in ("HOME", "USER", "SSH_AUTH_SOCK") if name in parent}
    own["PDSH_SSH_ARGS_APPEND"] = (
        "-o BatchMode=yes -o ConnectTimeout=10 -o ServerAliveInterval=5 -o ServerAliveCountMax=3"
    )
    # No blank lines and no comments: either is an error to DeepSpeed.
    listing = "".join(f"{name}={value}\n" for name, value in sorted(formatted.items()) if value)
    return RemotePlan(tuple(argv), own, {".deepspeed_env": listing}, handoff, slots)
