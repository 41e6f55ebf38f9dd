"""A process that does the imports of ranks once, and forks ranks: `-m dstune.launch.local.fork_server FOLDER SOCKET OWNER IMPORTS`.

SOCKET is the descriptor of a listening Unix socket in FOLDER. OWNER is `PID SECONDS`: the server ends when the process PID does,
or after SECONDS without a request (0: never). IMPORTS names further modules besides those of every rank, separated by commas.
`dstune.launch.local.warm` starts the server and sends it requests.

The server itself only forks, and reads no request: what it read would stay in its memory, and each later rank has a copy of that
memory. For each connection it forks a keeper, which reads the request, forks the rank, reports the rank's pid and later how it
ended, and kills it when the client (the requesting process) goes. So killing the server ends no run that it has started, and no
rank can find a secret of another one. The server has only the variables that imports may read (`warm.import_environment`).

The server must have no CUDA context, process group or thread, which is checked at every request. If a forked rank would differ
from one that starts cold, the server declines with the reason, and the client starts its rank cold.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import struct
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from dstune.core import rank_env
from dstune.core.parsing import parse_json
from dstune.launch.local import forking

SOCKET = "socket"
EVERY_RANK = ("dstune.rank.worker", "deepspeed.runtime.engine", "transformers.models.auto.modeling_auto")
"""Modules that every rank imports. wandb is not among them: it creates a folder on import, and the first fork that ends would
remove that folder for all others."""
MOST_BYTES = 1 << 20
"""Largest size of a request, which holds arguments and environment."""
REQUEST_SECONDS = 5.0
"""How long a client may take to send its request after it has connected."""
VARIABLES = {
    # Otherwise `is_available` initializes CUDA, and no fork of this process could use a GPU.
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
    # Otherwise the allocator of pyarrow runs a thread that frees memory.
    "JE_ARROW_MALLOC_CONF": "background_thread:false",
}
"""Variables of the server alone; its forks get the variables of their requests."""
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""Signals that a scheduler sends to every process of a job. The server and the keepers ignore them: they end once nobody needs
them."""
PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of linux/prctl.h


LAST = b"l"
"""What a fork writes if the server shall serve no later request."""


class Declined(Exception):
    """Raised with the reason why a rank must start cold."""


class Server:
    """Answers requests, after comparing each with the state of this process at the end of its imports."""

    def __init__(
        self, server_descriptors: Sequence[int], places: forking.Places, variables: Mapping[str, str], started: int
    ):
        """server_descriptors: descriptors that forks close. variables: the environment that the process was started with.
        started: the time before the imports, in nanoseconds."""
        self._server_descriptors, self._places, self._variables = server_descriptors, places, variables
        self._variables_of_imports = {name: value for name, value in os.environ.items() if name not in variables}
        self._context = forking.context()
        self._sources = source_states()
        now = time.time_ns()  # a file with a time in the future was not written during the imports
        self._changed_during_imports = [
            name for name, (_, changed) in self._sources.items() if started < changed <= now
        ]
        self._descriptors = open_descriptors()

    def answer(self, connection: socket.socket) -> bool:
        """Serve one request in a fork, and return whether the server can serve later ones too."""
        if peer_user(connection) != os.getuid():  # a second barrier: the folder of the socket is closed to other users
            return True
        threads = len(os.listdir("/proc/self/task"))  # a fork has one alone
        reading, writing = os.pipe()
        try:
            if os.fork() == 0:
                os.close(reading)
                self._serve(connection, writing, threads)
        except OSError as error:
            with contextlib.suppress(OSError):  # the client may be gone
                send(connection, {"cold": str(error)})
            return True
        finally:
            os.close(writing)
            verdict = os.read(reading, 1)
            os.close(reading)
        return verdict != LAST

    def _serve(self, connection: socket.socket, verdict: int, threads: int) -> NoReturn:
        """Read a request in a fork of the server, write to the pipe `verdict` whether it is the server's last one, and become the
        keeper of the rank. threads: of the server."""
        streams: list[int] = []
        try:
            connection.settimeout(REQUEST_SECONDS)
            data, streams, _, _ = socket.recv_fds(connection, MOST_BYTES, 3, socket.MSG_CMSG_CLOEXEC)
            if not data:
                os._exit(0)
            request = parse_json(data)
            if "end" in request:
                os.write(verdict, LAST)
                os._exit(0)
            if threads != 1:
                raise Declined(f"the process with the imports has {threads} threads")
            self._check_sources()
            self._check(request, {*streams, connection.fileno(), verdict})
            os.close(verdict)  # so that the server goes on
            for descriptor in self._server_descriptors:
                os.close(descriptor)
            request["env"] = self._variables_of_imports | request["env"]
            keep(connection, request, streams, self._places)
        except BaseException as error:  # of a malformed request too
            if isinstance(error, Stale):
                os.write(verdict, LAST)
            reason = str(error) if isinstance(error, Declined) else f"{type(error).__name__}: {error}"
            with contextlib.suppress(OSError):  # the client may be gone
                send(connection, {"cold": reason})
        finally:
            os._exit(1)

    def _check_sources(self) -> None:
        """Raise Stale if an imported file or the set of installed packages has changed since the imports began."""
        current = source_states()
        if self._changed_during_imports:
            raise Stale(f"{self._changed_during_imports[0]} has changed while it was imported")
        changed = [name for name, state in self._sources.items() if current.get(name) != state]
        packages = [name for name in current.keys() - self._sources.keys() if not name.endswith(".py")]
        if changed or packages:
            raise Stale(f"{min(changed + packages)} has changed since it was imported")

    def _check(self, request: Mapping[str, Any], request_descriptors: set[int]) -> None:
        """Raise Declined if a fork would differ from a process that starts now."""
        variables = request["imports"]
        compared = {*variables, *self._variables} - VARIABLES.keys()
        differing = {name for name in compared if variables.get(name) != self._variables.get(name)}
        if differing:
            raise Declined(f"the environment of the imports differs: {', '.join(sorted(differing)[:4])}")
        for name, value in self._context.items():
            if json.loads(json.dumps(value)) != request["context"][name]:
                raise Declined(f"the {name} is different")
        for name in forking.MEMORY_LIMITS:
            if request["limits"][name][0] != -1:
                raise Declined(f"{name} limits the memory of this run")
        leaked = open_descriptors().keys() - self._descriptors.keys() - request_descriptors
        if leaked:
            raise Declined(f"the process with the imports has {len(leaked)} leaked descriptor(s)")
        torch = sys.modules.get("torch")
        if torch is not None and (torch.cuda.is_initialized() or torch.distributed.is_initialized()):
            raise Declined("an import has begun to use a GPU or a process group")


class Stale(Declined):
    """Raised if a process that starts now would import other files than this one did."""


def keep(connection: socket.socket, request: Mapping[str, Any], streams: Sequence[int], places: forking.Places) -> None:
    """Fork the rank, report its pid, wait for it, and report how it ended; kill it if the client goes."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    connection.settimeout(None)
    os.setsid()
    keeper = os.getpid()
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        connection.close()
        start_rank(request, streams, places, keeper, writing)
    os.close(writing)
    for descriptor in streams:
        os.close(descriptor)
    places.show(["dstune: keeper of rank process", str(pid)], {})
    process = os.pidfd_open(pid)
    start_report = b"".join(iter(lambda: os.read(reading, 4096), b"")).decode()
    os.close(reading)
    if start_report != READY:
        os.waitpid(pid, 0)
        send(connection, {"cold": start_report or "the fork ended before it became a rank"})
        os._exit(0)
    # Unlike the pid, the descriptor never refers to another process.
    socket.send_fds(connection, [json.dumps({"pid": pid}).encode()], [process])
    waiting = select.poll()
    waiting.register(process, select.POLLIN)
    waiting.register(connection, select.POLLIN)
    if process not in {descriptor for descriptor, _ in waiting.poll()}:
        signal.pidfd_send_signal(process, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    with contextlib.suppress(OSError):
        send(connection, {"status": os.waitstatus_to_exitcode(status)})
    os._exit(0)


READY = "ready"


def start_rank(
    request: Mapping[str, Any], streams: Sequence[int], places: forking.Places, keeper: int, report: int
) -> None:
    """Turn the forked process into the rank, write READY or the problem to the pipe `report`, run the module, and end."""
    try:
        ctypes.CDLL(None).prctl(PARENT_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != keeper:
            os._exit(1)
        rank_env.forked_by = keeper
        os.set_inheritable(report, False)
        # `become` overwrites the descriptors 0 to 2, so the streams move out of their way first.
        moved_streams = [fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, 64) for descriptor in streams]
        for descriptor in streams:
            os.close(descriptor)
        forking.become(request, moved_streams, places)
        torch = sys.modules.get("torch")
        if torch is not None and torch.cuda._is_in_bad_fork():
            raise Declined("an import has begun to use a GPU")
    except BaseException as error:
        os.write(report, f"{type(error).__name__}: {error}".encode())
        os._exit(1)
    os.write(report, READY.encode())
    os.close(report)
    run_module(request["argv"])


def run_module(argv: Sequence[str]) -> None:
    """Run the command `python -u -m MODULE ARGUMENT...`, and end this process without the cost of freeing its modules."""
    module = argv[argv.index("-m") + 1]
    sys.argv[:] = argv[argv.index("-m") + 1 :]
    sys.orig_argv[:] = argv
    sys.modules.pop(module, None)  # it runs as `__main__`
    code: Any = 0
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as error:
        code = error.code or 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    if not isinstance(code, int):
        print(code, file=sys.stderr)
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code & 0xFF)


def import_modules(further: Sequence[str]) -> None:
    """Import DeepSpeed, the modules of every rank and those in `further`."""
    from dstune.zero.start import import_deepspeed

    import_deepspeed()
    for module in (*EVERY_RANK, *filter(None, further)):
        importlib.import_module(module)


def source_states() -> dict[str, tuple[int, int]]:
    """Return (size in bytes, time of change in ns) by path, from which a change of the imported code shows.

    Covers files of dstune, other imported files outside installed packages, and the metadata that says which packages are
    installed (with size 0).
    """
    states: dict[str, tuple[int, int]] = {}
    installed = tuple(path for path in sys.path if path.endswith(("site-packages", "dist-packages")))
    library = os.path.dirname(os.__file__)
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if not isinstance(file, str) or not file.endswith(".py"):
            continue
        if name.split(".")[0] == "dstune" or not file.startswith((*installed, library)):
            with contextlib.suppress(OSError):
                status = os.stat(file)
                states[file] = (status.st_size, status.st_mtime_ns)
    for folder in installed:
        with contextlib.suppress(OSError), os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.endswith((".dist-info", ".egg-info", ".egg-link", ".pth")):
                    states[entry.path] = (0, entry.stat().st_mtime_ns)
    return states


def open_descriptors() -> dict[int, str]:
    """Return the open descriptors of this process with their targets."""
    targets = {}
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # the descriptor of the listing itself is closed by now
            targets[int(name)] = os.readlink(f"/proc/self/fd/{name}")
    return targets


def peer_user(connection: socket.socket) -> int:
    """Return the user id of the process at the other end."""
    _, user, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return int(user)


def send(connection: socket.socket, message: Mapping[str, Any]) -> None:
    connection.send(json.dumps(message).encode())


def main(argv: Sequence[str]) -> None:
    """Do the imports, then serve requests until the owner ends, no request has come for too long, or the code has changed."""
    folder, listening = argv[0], socket.socket(fileno=int(argv[1]))
    owner, idle_seconds = map(int, argv[2].split())
    started = time.time_ns()
    listening.set_inheritable(False)
    owner_process = os.pidfd_open(owner)
    if os.getppid() == owner:
        ctypes.CDLL(None).prctl(PARENT_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)
    places = forking.Places()
    variables = (
        forking.initial_environment()
    )  # os.environ may also have LC_CTYPE, which the interpreter adds in each rank too
    places.show(["dstune: fork server of process", str(owner)], {})
    for environment in (variables, os.environ):
        del environment[forking.ROOM_VARIABLE]
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for keepers, so that they must not become zombies
    os.chdir("/")
    import_modules(argv[3].split(","))
    # A first fork makes OpenBLAS end its threads, which it starts again when they are needed.
    if os.fork() == 0:
        os._exit(0)
    server = Server([listening.fileno(), owner_process], places, variables, started)
    gc.collect()
    gc.freeze()  # so that a garbage collection in a fork does not copy the pages of the imports
    waiting = select.poll()
    waiting.register(listening, select.POLLIN)
    waiting.register(owner_process, select.POLLIN)
    while True:
        ready = {descriptor for descriptor, _ in waiting.poll(idle_seconds * 1000 or None)}
        if not ready:
            os.unlink(os.path.join(folder, SOCKET))  # the next launch starts another server
        if owner_process in ready or not ready:
            return
        connection, _ = listening.accept()
        with connection:
            if not server.answer(connection):
                return


if __name__ == "__main__":
    # Otherwise importing this module by its name would load it a second time.
    sys.modules[__spec__.name] = sys.modules["__main__"]
    main(sys.argv[1:])
