"""A process that imports what ranks import, once, and forks them: `-m dstune.launch.local.fork_server FOLDER SOCKET OWNER IMPORTS`.

SOCKET is the descriptor of a listening Unix socket in FOLDER. OWNER is `PID SECONDS`: this process ends when that one does, and
after so many seconds without a request (0: never). IMPORTS names modules beside those of every rank, with commas between.
`dstune.launch.local.warm` starts it and asks it.

The server itself only forks. For each request it makes a keeper, which forks the rank, reports its pid and later how it ended,
and kills it when the asking process goes. So a server that is killed costs no run that it has started. A rank has no secret of
another one: this process has the variables alone that imports may read (`warm.import_environment`), and keeps no request.

There is no CUDA context, process group or thread here. That is checked before every fork; a request that cannot be served as a
cold start would be is declined with the reason, and the asking process starts its rank cold.
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
from typing import Any

from dstune.core import rank_env
from dstune.launch.local import forking

SOCKET = "socket"
EVERY_RANK = ("dstune.rank.worker", "deepspeed.runtime.engine", "transformers.models.auto.modeling_auto")
"""What a rank imports whatever it trains. Not wandb: it makes a folder when it is imported, which the first fork that ends
removes for all others."""
MOST_BYTES = 1 << 20
"""Of a request: arguments and environment."""
REQUEST_SECONDS = 5.0
"""Between a connection and its request."""
VARIABLES = {
    # `is_available` otherwise initializes CUDA, and no fork of this process could use a GPU.
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
    # The allocator of pyarrow otherwise has a thread that frees memory.
    "JE_ARROW_MALLOC_CONF": "background_thread:false",
}
"""Of this process alone; its forks have the variables of their requests."""
REQUESTS_TO_STOP = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""A scheduler sends them to every process of a job. The server and the keepers end when nobody needs them any more."""
PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of linux/prctl.h


class Declined(Exception):
    """Why a rank has to start cold."""


class Server:
    """What the process was like when its imports were done; a request is compared with it."""

    def __init__(
        self, server_descriptors: Sequence[int], places: forking.Places, variables: Mapping[str, str], started: int
    ):
        """server_descriptors: those that no fork keeps. variables: the environment that the process was started with.
        started: the time before the imports, in nanoseconds."""
        self._server_descriptors, self._places, self._variables = server_descriptors, places, variables
        self._added = {name: value for name, value in os.environ.items() if name not in variables}
        self._context = forking.context()
        self._sources = sources()
        now = time.time_ns()  # what has a time in the future was not written during the imports
        self._late = [name for name, (_, changed) in self._sources.items() if started < changed <= now]
        self._descriptors = descriptors()

    def answer(self, connection: socket.socket) -> bool:
        """Serve one request. Returns whether the server is of use to later ones."""
        if peer_user(connection) != os.getuid():  # the folder of the socket keeps others away already
            return True
        streams: list[int] = []
        try:
            connection.settimeout(REQUEST_SECONDS)
            data, streams, _, _ = socket.recv_fds(connection, MOST_BYTES, 3, socket.MSG_CMSG_CLOEXEC)
            if data:
                request = json.loads(data)
                if "end" in request:
                    return False
                self._check_sources()
                self._check(request, {*streams, connection.fileno()})
                self._fork(connection, request, streams)
        except (Declined, OSError, ValueError, KeyError, TypeError) as error:  # the last three: no request
            with contextlib.suppress(OSError):  # nobody may wait for an answer any more
                send(connection, {"cold": str(error)})
            return not isinstance(error, Stale)
        finally:
            for descriptor in streams:
                os.close(descriptor)
        return True

    def _check_sources(self) -> None:
        """Raises Stale."""
        now = sources()
        if self._late:
            raise Stale(f"{self._late[0]} has changed while it was imported")
        changed = [name for name, state in self._sources.items() if now.get(name) != state]
        packages = [name for name in now.keys() - self._sources.keys() if not name.endswith(".py")]
        if changed or packages:
            raise Stale(f"{min(changed + packages)} has changed since it was imported")

    def _check(self, request: Mapping[str, Any], of_request: set[int]) -> None:
        """Raises Declined where a fork would differ from a process that starts now."""
        variables = request["imports"]
        compared = {*variables, *self._variables} - VARIABLES.keys()
        names = {name for name in compared if variables.get(name) != self._variables.get(name)}
        if names:
            raise Declined(f"the environment of the imports differs: {', '.join(sorted(names)[:4])}")
        for name, value in self._context.items():
            if json.loads(json.dumps(value)) != request["context"][name]:
                raise Declined(f"the {name} is another one")
        for name in forking.MEMORY_LIMITS:
            if request["limits"][name][0] != -1:
                raise Declined(f"{name} limits the memory of this run")
        if (threads := len(os.listdir("/proc/self/task"))) != 1:
            raise Declined(f"the process with the imports has {threads} threads")
        leaked = descriptors().keys() - self._descriptors.keys() - of_request
        if leaked:
            raise Declined(f"the process with the imports holds {len(leaked)} further descriptor(s)")
        torch = sys.modules.get("torch")
        if torch is not None and (torch.cuda.is_initialized() or torch.distributed.is_initialized()):
            raise Declined("an import has begun to use a GPU or a process group")

    def _fork(self, connection: socket.socket, request: dict[str, Any], streams: Sequence[int]) -> None:
        """Make the keeper of a rank."""
        if os.fork() == 0:
            try:
                for descriptor in self._server_descriptors:
                    os.close(descriptor)
                request["env"] = self._added | request["env"]
                keep(connection, request, streams, self._places)
            except BaseException as error:
                with contextlib.suppress(OSError):
                    send(connection, {"cold": f"{type(error).__name__}: {error}"})
            finally:
                os._exit(1)


class Stale(Declined):
    """What was imported is not what a process would import now."""


def keep(connection: socket.socket, request: Mapping[str, Any], streams: Sequence[int], places: forking.Places) -> None:
    """Fork the rank, report it, wait for it, report its end; end it when the asking process goes."""
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
    problem = b"".join(iter(lambda: os.read(reading, 4096), b"")).decode()
    os.close(reading)
    if problem != READY:
        os.waitpid(pid, 0)
        send(connection, {"cold": problem or "the fork ended before it was a rank"})
        os._exit(0)
    # The descriptor names this very process, also when its number belongs to another one.
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
    """Become the rank in the forked process, say so, run the module, end."""
    try:
        ctypes.CDLL(None).prctl(PARENT_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != keeper:
            os._exit(1)
        rank_env.forked_by = keeper
        os.set_inheritable(report, False)
        high = [fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, 64) for descriptor in streams]
        for descriptor in streams:
            os.close(descriptor)
        forking.become(request, high, places)
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
    """Run as `python -u -m MODULE ARGUMENT...`, and end this process without freeing what was imported."""
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
    from dstune.zero.start import import_deepspeed

    import_deepspeed()
    for module in (*EVERY_RANK, *filter(None, further)):
        importlib.import_module(module)


def sources() -> dict[str, tuple[int, int]]:
    """Return size and time of the files of dstune and of other imported code outside installed packages, and the times of what
    says which packages are installed."""
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


def descriptors() -> dict[int, str]:
    """Return the open descriptors of this process, and what each one leads to."""
    targets = {}
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # that of the listing itself
            targets[int(name)] = os.readlink(f"/proc/self/fd/{name}")
    return targets


def peer_user(connection: socket.socket) -> int:
    """Return the number of the user at the other end."""
    _, user, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return int(user)


def send(connection: socket.socket, message: Mapping[str, Any]) -> None:
    connection.send(json.dumps(message).encode())


def main(argv: Sequence[str]) -> None:
    folder, listening = argv[0], socket.socket(fileno=int(argv[1]))
    owner, idle_seconds = map(int, argv[2].split())
    started = time.time_ns()
    listening.set_inheritable(False)
    process = os.pidfd_open(owner)
    if os.getppid() == owner:
        ctypes.CDLL(None).prctl(PARENT_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)
    places = forking.Places()
    variables = forking.initial_environment()  # to which the interpreter may add LC_CTYPE, as it does in each rank
    places.show(["dstune: fork server of process", str(owner)], {})
    for environment in (variables, os.environ):
        del environment[forking.ROOM_VARIABLE]
    for number in REQUESTS_TO_STOP:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # keepers are nobody's business
    os.chdir("/")
    import_modules(argv[3].split(","))
    # OpenBLAS ends its threads before a fork and starts them again when they are needed.
    if os.fork() == 0:
        os._exit(0)
    server = Server([listening.fileno(), process], places, variables, started)
    gc.collect()
    gc.freeze()  # what a fork alone collects needs no copy of the rest
    waiting = select.poll()
    waiting.register(listening, select.POLLIN)
    waiting.register(process, select.POLLIN)
    while True:
        ready = {descriptor for descriptor, _ in waiting.poll(idle_seconds * 1000 or None)}
        if not ready:
            os.unlink(os.path.join(folder, SOCKET))  # the next launch starts another one
        if process in ready or not ready:
            return
        connection, _ = listening.accept()
        with connection:
            if not server.answer(connection):
                return


if __name__ == "__main__":
    # One module, by whatever name it is known.
    sys.modules[__spec__.name] = sys.modules["__main__"]
    main(sys.argv[1:])
