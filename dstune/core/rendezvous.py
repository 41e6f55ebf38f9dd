"""Sets MASTER_ADDR and MASTER_PORT, where ranks meet, for launchers that do not set them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from pathlib import Path

from dstune.core import files
from dstune.core.errors import Problem, TrainingFailed, UserError
from dstune.core.paths import cache_root
from dstune.core.rank_env import GROUP_SECRET, LAUNCH_ID, STORE, RankEnv

SECRET_FILE = Path("launch") / "secret"
MEETING_SECONDS = 300.0
"""How long ranks wait for rank 0's address: nodes of a job do not start at the same time."""


def set_address(env: RankEnv, variables: MutableMapping[str, str]) -> None:
    """Set where the ranks meet that another launcher started, unless that launcher has set it.

    Ranks know no run directory yet, so rank 0 writes a file that only this user can read into the cache folder and the working
    directory. The file has the folder of a store if all ranks are on this machine, otherwise rank 0's address and a random port;
    and a secret by which ranks prove that they belong to this launch.

    Raises:
        UserError: the launcher gives no address and the ranks are on several nodes; the same on all ranks.
        TrainingFailed: rank 0's file did not appear in time.
    """
    if variables.get("MASTER_ADDR") and variables.get("MASTER_PORT"):
        return
    if env.world_size == 1:
        variables.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    elif env.source == "slurm" or env.local_size == env.world_size:
        _meet_in_private(env, variables)
        choose_interface(env, variables)
    elif not set_address_over_mpi(env, variables):
        raise UserError(
            Problem(
                "MASTER_ADDR",
                reason=f"ranks on several nodes need an address to meet at, {env.source} gives none, and mpi4py is missing",
                fix="pip install '.[mpi]' in a clone of dstune, or export MASTER_ADDR (host of rank 0) and MASTER_PORT, for "
                "example mpirun -x MASTER_ADDR",
            )
        )


def _meet_in_private(env: RankEnv, variables: MutableMapping[str, str], seconds: float = MEETING_SECONDS) -> None:
    identity = _identity(env, variables)
    name = hashlib.sha256(f"{env.source} {identity}".encode()).hexdigest()[:32]
    places = [folder / f".dstune-meeting-{name}.json" for folder in (cache_root(), Path.cwd())]
    if env.rank == 0:
        meeting = {GROUP_SECRET: secrets.token_hex(32)}
        if env.local_size == env.world_size:
            meeting[STORE] = str(Path(tempfile.mkdtemp(prefix="dstune-")) / "store")
        else:
            address = own_address(variables.get("GLOO_SOCKET_IFNAME"))
            meeting |= {"MASTER_ADDR": address, "MASTER_PORT": str(free_port())}
        for place in places:
            with contextlib.suppress(OSError):
                place.parent.mkdir(parents=True, exist_ok=True)
                content = {"identity": identity, "place": _place(), "pid": os.getpid(), "given": meeting}
                files.write(place, json.dumps(content), mode=0o600)
    else:
        meeting = _wait_for_private_meeting(places, identity, seconds)
    variables.update(meeting)


def _wait_for_private_meeting(places: Sequence[Path], identity: str, seconds: float) -> dict[str, str]:
    """Wait for rank 0's variables in one of `places`. Raises TrainingFailed after `seconds`."""
    import psutil

    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        for place in places:
            try:
                content = json.loads(files.read_own(place))
                # The process that wrote the file of an earlier launch has ended.
                gone = content["place"] == _place() and not psutil.pid_exists(content["pid"])
                if content["identity"] == identity and not gone:
                    return dict(content["given"])
            except (OSError, ValueError, KeyError, TypeError):
                pass
        time.sleep(0.05)
    raise TrainingFailed(
        f"rank 0 did not say within {seconds:g} s where it is, neither in {places[0].parent} nor in {places[1].parent}: start in "
        "a folder that all nodes see, or export MASTER_ADDR (host of rank 0) and MASTER_PORT to all ranks"
    )


def _place() -> str:
    """Return an id of the process namespace, the machine or a container on it, in which a process id has one meaning."""
    with contextlib.suppress(OSError):
        return f"{socket.gethostname()} {os.readlink('/proc/self/ns/pid')}"
    return socket.gethostname()


def remove_meeting_files(env: RankEnv, variables: Mapping[str, str]) -> None:
    """Remove the files that rank 0 wrote for the others. Call it when all ranks have joined the process group."""
    if env.rank == 0 and variables.get(GROUP_SECRET):
        for folder in (cache_root(), Path.cwd()):
            for place in folder.glob(".dstune-meeting-*.json"):
                with contextlib.suppress(OSError, ValueError, KeyError):
                    if json.loads(files.read_own(place))["given"][GROUP_SECRET] == variables[GROUP_SECRET]:
                        place.unlink()


def leave_store(env: RankEnv, variables: MutableMapping[str, str]) -> None:
    """Remove the folder in which ranks met through `set_address`. Call it at the end of the launch."""
    store = variables.pop(STORE, None)
    if store is not None and env.rank == 0:
        shutil.rmtree(Path(store).parent, ignore_errors=True)


def set_address_over_mpi(env: RankEnv, variables: MutableMapping[str, str]) -> bool:
    """Broadcast rank 0's address and a free port through MPI, once. Return False if mpi4py is not installed or cannot start.

    Raises:
        UserError: mpi4py uses another MPI than the launcher, so that every rank is alone.
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
    own_place = (own_address(variables.get("GLOO_SOCKET_IFNAME")), free_port()) if env.rank == 0 else None
    address, port = world.bcast(own_place)
    MPI.Finalize()  # ranks exit without interpreter shutdown, which an open MPI would report as a failure
    variables.update(MASTER_ADDR=address, MASTER_PORT=str(port))
    choose_interface(env, variables)
    return True


def choose_interface(env: RankEnv, variables: MutableMapping[str, str]) -> None:
    """Let gloo use the network interface that leads to rank 0, unless GLOO_SOCKET_IFNAME is set.

    By default gloo uses the interface of the host's name, which many systems resolve to the loopback (127.0.1.1).
    """
    if env.local_size == env.world_size or variables.get("GLOO_SOCKET_IFNAME"):
        return
    import psutil

    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((variables["MASTER_ADDR"], int(variables["MASTER_PORT"])))  # sends nothing
            address_in_use = probe.getsockname()[0]
    except OSError:
        return
    names = [
        name
        for name, entries in psutil.net_if_addrs().items()
        if address_in_use in [entry.address for entry in entries]
    ]
    if names and names != ["lo"]:
        variables["GLOO_SOCKET_IFNAME"] = names[0]


def meet(env: RankEnv, run_dir: Path, variables: MutableMapping[str, str]) -> None:
    """Set MASTER_ADDR and MASTER_PORT for ranks that know their run directory, unless the launcher has set them: rank 0 writes its
    address and a free port into a file there.

    Raises:
        UserError: rank 0's address did not appear within `MEETING_SECONDS`.
    """
    if env.source == "slurm":
        _read_secret(run_dir, variables)
    if variables.get("MASTER_ADDR") and variables.get("MASTER_PORT"):
        choose_interface(env, variables)
        return
    if env.source == "openmpi" and set_address_over_mpi(env, variables):
        return
    if env.world_size == 1:
        address, port = "127.0.0.1", free_port()
    else:
        file = run_dir / "launch" / "meeting.json"
        identity = _identity(env, variables)
        if env.rank == 0:
            address, port = own_address(variables.get("GLOO_SOCKET_IFNAME")), free_port()
            _write_meeting(file, {"identity": identity, "address": address, "port": port})
        else:
            address, port = _wait_for_address(file, identity)
    variables.update(MASTER_ADDR=address, MASTER_PORT=str(port))
    choose_interface(env, variables)


def leave_secret(run_dir: Path) -> None:
    """Write a secret for the ranks of this job into a file that only this user can read. Raises OSError."""
    (run_dir / SECRET_FILE).parent.mkdir(parents=True, exist_ok=True)
    files.write(run_dir / SECRET_FILE, secrets.token_hex(32), mode=0o600)


def _read_secret(run_dir: Path, variables: MutableMapping[str, str]) -> None:
    """Set the secret that `leave_secret` wrote. Without one (a script of an earlier version, a file system where everybody can read
    every file), ranks do not prove who they are."""
    with contextlib.suppress(OSError):
        variables.setdefault(GROUP_SECRET, files.read_own(run_dir / SECRET_FILE).decode())


def _identity(env: RankEnv, variables: MutableMapping[str, str]) -> str:
    """Return an id that distinguishes this start of the ranks from any other one in the same run directory.

    Raises:
        UserError: there is none, so ranks could meet those of another start.
    """
    names = {
        "slurm": ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT"),
        "openmpi": (LAUNCH_ID, "PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid"),
    }.get(env.source, (LAUNCH_ID,))
    identity = " ".join(variables.get(name, "") for name in names).strip()
    if not identity and env.local_size == env.world_size:
        identity = _launcher(env)
    if not identity:
        reason = f"{env.source} gives the ranks nothing that tells this start from an earlier one"
        fix = "export a new value to all ranks at each start, for example mpiexec -genv DSTUNE_LAUNCH_ID $(uuidgen) ..."
        raise UserError(Problem(LAUNCH_ID, reason, fix))
    return identity


def _launcher(env: RankEnv) -> str:
    """Return an id of the process that started all ranks of this machine: the nearest ancestor without a rank's variable (a shell
    script around a rank has it). MPICH's mpiexec sets no variable that could be used instead. Empty if no ancestor is visible."""
    import psutil

    place = {"pmi": "PMI_RANK", "openmpi": "OMPI_COMM_WORLD_RANK", "slurm": "SLURM_PROCID"}.get(env.source, "RANK")
    for process in psutil.Process().parents():
        try:
            if place not in process.environ():
                return f"{_place()} {process.pid}"
        except psutil.AccessDenied:  # another user's, such as the daemon of a queue
            return f"{_place()} {process.pid}"
        except psutil.Error:
            pass
    return ""


def _write_meeting(file: Path, meeting: dict[str, object]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    files.write(file, json.dumps(meeting))


def _wait_for_address(
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
    """Return how other nodes reach this one: its address on `interface`, or else its name, if that can be resolved, or else its
    first address that is not a loopback address.

    Raises:
        UserError: there is no such interface, or it has no IPv4 address.
    """
    import psutil

    addresses_of = {
        name: [entry.address for entry in entries if entry.family == socket.AF_INET]
        for name, entries in psutil.net_if_addrs().items()
    }
    if interface:
        if not addresses_of.get(interface):
            having = ", ".join(name for name, addresses in addresses_of.items() if addresses)
            reason = f"{socket.gethostname()} has no such interface with an IPv4 address"
            raise UserError(Problem("launch.interface", reason, f"one of {having}", interface))
        return addresses_of[interface][0]
    host = socket.gethostname()
    try:
        if not socket.gethostbyname(host).startswith("127."):
            return host
    except OSError:
        pass
    others = [address for addresses in addresses_of.values() for address in addresses if not address.startswith("127.")]
    return next(iter(others), "127.0.0.1")


def free_port() -> int:
    """Return a port of this node on which nothing listens at the moment."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])
