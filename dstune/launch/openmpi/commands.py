"""A pure function from a run to mpirun's command line and environment."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from pathlib import Path

from dstune.config.schema import RunConfig
from dstune.launch.openmpi.config import OpenMpiConfig
from dstune.launch.remote_commands import RemotePlan, path_of, ssh_of, variables_of


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
    """Return the command line and environment of Open MPI's mpirun.

    slots: numbers of the slots by host; a single host `localhost` needs no ssh. program: path of mpirun. as_root: whether the
    user is root, which mpirun refuses otherwise. on_cpu: whether the hosts have no GPU.

    Raises:
        UserError: an unset variable in `launch.export_env`.
    """
    launch = config.launch
    assert isinstance(launch, OpenMpiConfig)
    visible_variables, handoff = variables_of(config, run_dir, launch, launch_id, parent, on_cpu=on_cpu)
    size = sum(len(host_slots) for host_slots in slots.values())
    hosts = ",".join(f"{host}:{len(host_slots)}" for host, host_slots in slots.items())
    agent = shlex.join(["ssh", *ssh_of(launch).options()])
    argv = [
        *(program, "-n", str(size), "--host", hosts),
        *("--map-by", "slot", "--bind-to", "none", "--oversubscribe"),
        *("--mca", "plm_ssh_agent", agent, "--prtemca", "plm_ssh_agent", agent),
        *(["--mca", "btl_tcp_if_include", launch.interface] if launch.interface else []),
        *(["--prtemca", "prte_if_include", launch.interface] if launch.interface else []),
        *launch.mpirun_options,
        # Only names, so that no value shows on a command line; the values are in mpirun's environment.
        *[word for name in sorted(visible_variables) for word in ("-x", name)],
        *(sys.executable, "-u", "-m", "dstune.worker", str(run_dir.absolute())),
    ]
    env = {name: value for name, value in parent.items() if name in ("HOME", "USER", "SSH_AUTH_SOCK", "TMPDIR")}
    env |= visible_variables
    env["PATH"] = path_of(parent)
    if as_root:
        env |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    return RemotePlan(tuple(argv), env, handoff, slots)
