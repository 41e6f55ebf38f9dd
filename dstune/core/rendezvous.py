"""Where ranks meet: MASTER_ADDR and MASTER_PORT for launchers that do not set them."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import subprocess
import time
from collections.abc import Callable, MutableMapping
from pathlib import Path
from zlib import crc32

from dstune.core import files
from dstune.core.errors import Problem, UserError
from dstune.core.rank_env import GROUP_SECRET, RankEnv

FIRST_PORT, PORTS = 20_000, 10_000
"""Ports are derived from the identity of the job below the range that kernels hand out (32768 and up on Linux)."""
SECRET_FILE = Path("launch") / "secret"
MEETING_SECONDS = 300.0
"""How long ranks wait for rank 0's address: nodes of a job do not start at the same time."""


def set_address(env: RankEnv, variables: MutableMapping[str, str]) -> None:
    """Set MASTER_ADDR and MASTER_PORT where the launcher left them out. What it set is kept.

    Every rank must come to the same answer without talking to the others, so the port follows from the job's identity.

    Raises:
        UserError: the launcher gives no address and the ranks are on several nodes.
    """
    if variables.get("MASTER_ADDR") and variables.get("MASTER_PORT"):
        return
    if env.source == "slurm":
        address = _first_host(variables.get("SLURM_STEP_NODELIST") or variables["SLURM_JOB_NODELIST"])
        identity = f"{variables.get('SLURM_JOB_ID')}.{variables.get('SLURM_STEP_ID')}"
    elif env.local_size == env.world_size:
        address = "127.0.0.1"
        names = ("PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid", "PMI_ID", "HYDRA_JOB_ID")
        identity = next((variables[name] for name in names if variables.get(name)), "job")
    elif over_mpi(env, variables):
        return
    else:
        raise UserError(
            Problem(
                "MASTER_ADDR",
                reason=f"ranks on several nodes need an address to meet at, {env.source} gives none, and mpi4py is missing",
                fix="pip install 'dstune[mpi]', or export MASTER_ADDR (host of rank 0) and MASTER_PORT to all ranks, for "
                "example mpirun -x MASTER_ADDR",
            )
        )
    variables.setdefault("MASTER_ADDR", address)
    variables.setdefault("MASTER_PORT", str(FIRST_PORT + crc32(identity.encode()) % PORTS))
    choose_interface(env, variables)


def over_mpi(env: RankEnv, variables: MutableMapping[str, str]) -> bool:
    """Let rank 0 tell its address and a free port through MPI, once; False where mpi4py is not installed.

    Raises:
        UserError: mpi4py belongs to another MPI than the launcher, so that every rank is alone.
    """
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError):
        return False
    world = MPI.COMM_WORLD
    if world.Get_size() != env.world_size:
        library = MPI.Get_library_version().strip().splitlines()[0]
        reason = f"this launcher started {env.world_size} ranks, but to mpi4py ({library}) each is alone"
        raise UserError(
            Problem("MPI", reason, "start the ranks with the mpirun of that MPI, or install mpi4py for this one")
        )
    mine = (own_address(variables.get("GLOO_SOCKET_IFNAME")), free_port()) if env.rank == 0 else None
    address, port = world.bcast(mine)
    MPI.Finalize()  # ranks end without the interpreter's own end, which an MPI that is still open would call a failure
    variables.update(MASTER_ADDR=address, MASTER_PORT=str(port))
    choose_interface(env, variables)
    return True


def choose_interface(env: RankEnv, variables: MutableMapping[str, str]) -> None:
    """Let gloo use the network interface that leads to rank 0, where nothing else is said.

    It would take the one of the host's name, which many systems resolve to the loopback (127.0.1.1).
    """
    if env.local_size == env.world_size or variables.get("GLOO_SOCKET_IFNAME"):
        return
    import psutil

    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((variables["MASTER_ADDR"], int(variables["MASTER_PORT"])))  # sends nothing
            own = probe.getsockname()[0]
    except OSError:
        return
    names = [name for name, entries in psutil.net_if_addrs().items() if own in [entry.address for entry in entries]]
    if names and names != ["lo"]:
        variables["GLOO_SOCKET_IFNAME"] = names[0]


def meet(env: RankEnv, run_dir: Path, variables: MutableMapping[str, str]) -> None:
    """Set MASTER_ADDR and MASTER_PORT for ranks that know their run directory: a free port of rank 0's node, which tells
    the others through a file there. What the launcher set is kept.

    Raises:
        UserError: rank 0's address did not appear within `MEETING_SECONDS`.
    """
    if env.source == "slurm":
        _take_secret(run_dir, variables)
    if variables.get("MASTER_ADDR") and variables.get("MASTER_PORT"):
        choose_interface(env, variables)
        return
    if env.source == "openmpi" and over_mpi(env, variables):
        return
    if env.world_size == 1:
        address, port = "127.0.0.1", free_port()
    else:
        file = run_dir / "launch" / "meeting.json"
        identity = _identity(env, variables)
        if env.rank == 0:
            address, port = own_address(variables.get("GLOO_SOCKET_IFNAME")), free_port()
            _leave(file, {"identity": identity, "address": address, "port": port})
        else:
            address, port = _found(file, identity)
    variables.update(MASTER_ADDR=address, MASTER_PORT=str(port))
    choose_interface(env, variables)


def leave_secret(run_dir: Path) -> None:
    """Leave what the ranks of this job are to know and nobody else, in a file of this user alone. Raises OSError."""
    (run_dir / SECRET_FILE).parent.mkdir(parents=True, exist_ok=True)
    files.write(run_dir / SECRET_FILE, secrets.token_hex(32), mode=0o600)


def _take_secret(run_dir: Path, variables: MutableMapping[str, str]) -> None:
    """What `leave_secret` left; without one, ranks do not prove who they are (a script of an earlier version, or a file
    system where every file can be read by all)."""
    with contextlib.suppress(OSError):
        variables.setdefault(GROUP_SECRET, files.read_own(run_dir / SECRET_FILE).decode())


def _identity(env: RankEnv, variables: MutableMapping[str, str]) -> str:
    """What tells this start of the ranks from any other one in the same run directory."""
    names = {
        "slurm": ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT"),
        "openmpi": ("DSTUNE_LAUNCH_ID", "PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid"),
    }.get(env.source, ("DSTUNE_LAUNCH_ID", "PMI_ID", "HYDRA_JOB_ID"))
    return " ".join(variables.get(name, "") for name in names)


def _leave(file: Path, meeting: dict[str, object]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    files.write(file, json.dumps(meeting))


def _found(
    file: Path, identity: str, seconds: float = MEETING_SECONDS, pause: Callable[[float], None] = time.sleep
) -> tuple[str, int]:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            meeting = json.loads(file.read_text())
            if meeting["identity"] == identity:
                return str(meeting["address"]), int(meeting["port"])
        except (OSError, ValueError, KeyError):
            pass
        os.listdir(file.parent if file.parent.is_dir() else file.parent.parent)  # makes NFS look again
        pause(0.1)
    raise UserError(
        Problem(
            "run.dir",
            value=str(file.parent.parent),
            reason=f"rank 0 did not say within {seconds:g} s where it is: does every node see this folder?",
            fix="give a run.dir on a file system that the nodes share, or export MASTER_ADDR and MASTER_PORT to all ranks",
        )
    )


def own_address(interface: str | None) -> str:
    """How other nodes reach this one: its address on `interface`, else its name where that can be resolved, else its
    first address that is not the loopback's.

    Raises:
        UserError: there is no such interface, or it has no IPv4 address.
    """
    import psutil

    found = {
        name: [entry.address for entry in entries if entry.family == socket.AF_INET]
        for name, entries in psutil.net_if_addrs().items()
    }
    if interface:
        if not found.get(interface):
            having = ", ".join(name for name, addresses in found.items() if addresses)
            reason = f"{socket.gethostname()} has no such interface with an IPv4 address"
            raise UserError(Problem("launch.interface", reason, f"one of {having}", interface))
        return found[interface][0]
    host = socket.gethostname()
    try:
        if not socket.gethostbyname(host).startswith("127."):
            return host
    except OSError:
        pass
    others = [address for addresses in found.values() for address in addresses if not address.startswith("127.")]
    return next(iter(others), "127.0.0.1")


def free_port() -> int:
    """A port of this node that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def _first_host(nodes: str) -> str:
    """`n[3-4,7]` -> `n3`, by SLURM's own tool, which knows all of its notations."""
    names = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True)
    return names.stdout.split()[0]
