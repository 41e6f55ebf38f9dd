"""Warm starts (`launch.warm`): ranks are forked from a process that has already done their imports.

A command that may start ranks more than once (`launch.restarts`, a sweep, the fine-tuning API) offers a fork server to itself
and to its child processes, through the folder in the variable `FORK_SERVER`. The first launch that uses the folder starts the
server, and its ranks are the first forks. So the imports happen once for all ranks and all starts. If anything is wrong with a
server, the rank starts cold and one line says why.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from dstune.core.lease import LEASE
from dstune.core.rank_env import FORK_SERVER, GROUP_SECRET, LAUNCH_ID, LAUNCHER_PID, RUN_SHA256, STORE
from dstune.core.secrets import is_secret
from dstune.launch.local import forking
from dstune.launch.local.fork_server import SOCKET, VARIABLES
from dstune.protocols import TRACKERS, method_of

if TYPE_CHECKING:
    from dstune.config.schema import RunConfig

SERVER = "dstune.launch.local.fork_server"
LOCK, OWNER, OUTPUT = "lock", "owner", "output"
IMPORT_SECONDS = 180.0
"""How long a rank waits for the imports, which take a minute on a busy machine."""
POLL_SECONDS = 0.05
NOT_FOR_IMPORTS = {
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "DSTUNE_CONSOLE"),
    *(GROUP_SECRET, LAUNCHER_PID, LAUNCH_ID, LEASE, RUN_SHA256, STORE, "DSTUNE_PLUGINS", "DSTUNE_CACHE"),
}
"""Variables that differ between ranks or runs, and that no import reads: a rank reads them later, when it needs them."""
COLD = "dstune: the rank starts cold (launch.warm)"
SUPPORTED = sys.platform.startswith("linux") and hasattr(os, "pidfd_open")
DEVICES = "CUDA_VISIBLE_DEVICES"


class ForkedProcess:
    """A rank with the interface of `subprocess.Popen`. Its parent is a keeper, which reports how it ended.

    process: pidfd of the rank. connection: leads to the keeper. stdout: the rank's output if that is a pipe.
    """

    def __init__(self, pid: int, process: int, connection: socket.socket, stdout: IO[bytes] | None):
        self.pid, self.stdout = pid, stdout
        self.returncode: int | None = None
        self._process, self._connection = process, connection

    def poll(self) -> int | None:
        if self.returncode is None and _is_readable(self._connection.fileno()):
            message = _receive(self._connection)
            if message is None:  # the keeper was killed, and the kernel then kills the rank
                self._signal(signal.SIGKILL)
                if not _is_readable(self._process):
                    return None
            self.returncode = -signal.SIGKILL if message is None else int(message["status"])
            self._connection.close()
            os.close(self._process)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            self._signal(number)

    def _signal(self, number: int) -> None:
        with contextlib.suppress(OSError):  # the rank may have ended meanwhile
            signal.pidfd_send_signal(self._process, number)


class ForkServer:
    """Client of the server in `folder`, which another process may have started.

    imports: modules that the server imports besides those of every rank. message: gets one line for each failure to use the server.
    """

    def __init__(self, folder: Path, imports: Sequence[str], message: Callable[[str], None]):
        self._folder, self._imports, self._message = folder, imports, message
        self._server: subprocess.Popen[bytes] | None = None

    def start(
        self,
        argv: Sequence[str],
        env: Mapping[str, str],
        *,
        stdout: IO[bytes] | None,
        stderr: IO[bytes],
        interrupted: Callable[[], bool] = lambda: False,
    ) -> ForkedProcess | None:
        """Fork a process that runs `argv` with `env`; return None if it must start cold.

        stdout: None for a pipe. interrupted: returns whether to stop waiting for the imports, since the command is ending.
        """
        if not _is_module(argv):
            return None
        try:
            return self._start(argv, env, stdout, stderr, interrupted)
        except _Unusable as error:
            if not interrupted():
                self._message(f"{COLD}: {error}")
        except OSError as error:
            self._message(f"{COLD}: {error.strerror or error}")
        return None

    def _start(
        self,
        argv: Sequence[str],
        env: Mapping[str, str],
        stdout: IO[bytes] | None,
        stderr: IO[bytes],
        interrupted: Callable[[], bool],
    ) -> ForkedProcess:
        imports = import_environment(env)
        request = {"argv": list(argv), "env": dict(env), "imports": imports, "context": forking.context()}
        with contextlib.ExitStack() as stack:
            connection = self._connect(imports)
            stack.callback(connection.close)
            reading, writing = os.pipe() if stdout is None else (None, stdout.fileno())
            output = None if reading is None else stack.enter_context(os.fdopen(reading, "rb", buffering=0))
            stdin = stack.enter_context(open(os.devnull, "rb"))
            try:
                data = json.dumps(request | forking.describe()).encode()
                socket.send_fds(connection, [data], [stdin.fileno(), writing, stderr.fileno()])
            finally:
                if reading is not None:
                    os.close(writing)
            pid, process = self._wait(connection, interrupted)
            stdin.close()
            stack.pop_all()  # the rank keeps the connection and the output
        return ForkedProcess(pid, process, connection, output)

    def _wait(self, connection: socket.socket, interrupted: Callable[[], bool]) -> tuple[int, int]:
        """Wait for the answer to a request; return the pid and the pidfd of the rank. Raises _Unusable."""
        deadline = time.monotonic() + IMPORT_SECONDS
        while not _is_readable(connection.fileno(), POLL_SECONDS):
            if interrupted():
                raise _Unusable("the command was asked to stop")
            if time.monotonic() > deadline:
                raise _Unusable(f"the imports were not done after {IMPORT_SECONDS:.0f} s")
        descriptors: list[int] = []
        message = _receive(connection, descriptors)
        if message is None:
            raise _Unusable(f"the process with the imports has ended{self._last_line()}")
        if "cold" in message:
            raise _Unusable(str(message["cold"]))
        return int(message["pid"]), descriptors[0]

    @contextmanager
    def _open(self) -> Iterator[str]:
        """Yield the address of the server's socket. Raises _Unusable, OSError."""
        folder = os.open(self._folder, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            state = os.fstat(folder)
            if state.st_uid != os.getuid() or stat.S_IMODE(state.st_mode) & 0o077:
                raise _Unusable(f"{self._folder} is open to other users")
            # An address has at most 107 characters, and the path of a temporary folder may be longer.
            yield f"/proc/self/fd/{folder}/{SOCKET}"
        finally:
            os.close(folder)

    def _connect(self, imports: Mapping[str, str]) -> socket.socket:
        """Connect to the server, after starting it if no launch has done so yet. Raises _Unusable, OSError."""
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            with self._open() as address, (self._folder / LOCK).open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                try:
                    connection.connect(address)
                except FileNotFoundError:
                    self._launch(address, imports)
                    connection.connect(address)
                except ConnectionRefusedError:
                    os.unlink(address)  # so that the next launch starts another server
                    raise _Unusable("the process with the imports has ended") from None
        except BaseException:
            connection.close()
            raise
        return connection

    def _launch(self, address: str, imports: Mapping[str, str]) -> None:
        owner = (self._folder / OWNER).read_text()
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listening:
            listening.bind(address)
            listening.listen(64)
            with (self._folder / OUTPUT).open("wb") as output:
                arguments = [str(self._folder), str(listening.fileno()), owner, ",".join(self._imports)]
                self._server = subprocess.Popen(
                    [sys.executable, "-u", "-m", SERVER, *arguments, "x" * forking.ARGUMENT_ROOM],
                    env={**forking.padding(), **imports, **VARIABLES},
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    pass_fds=(listening.fileno(),),
                    start_new_session=True,
                )

    def _last_line(self) -> str:
        """Return the last line that the server printed, with a colon before it; empty if there is none."""
        with contextlib.suppress(OSError):
            lines = (self._folder / OUTPUT).read_text(errors="replace").strip().splitlines()
            return f": {lines[-1][:200]}" if lines else ""
        return ""

    def stop(self) -> None:
        """End the server, even if another process has started it. A server that is still importing ends after its imports."""
        if self._server is not None:
            self._server.kill()
            self._server.wait()
            return
        with contextlib.ExitStack() as stack:
            stack.enter_context(contextlib.suppress(OSError, _Unusable))
            connection = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
            connection.connect(stack.enter_context(self._open()))
            connection.send(json.dumps({"end": True}).encode())


class _Unusable(Exception):
    """Raised with the reason why a rank starts cold."""


@contextmanager
def offer(idle_seconds: int = 0) -> Iterator[dict[str, str]]:
    """Offer a fork server within the block, and yield the variables through which child processes use it.

    Yields no variables if a fork server is not possible here, or if this process was offered one already: children inherit that
    offer. The server never outlives this process.

    idle_seconds: the server ends after this long without a request, to free its memory; the next request starts another one.
    0: it never ends for this reason.
    """
    if FORK_SERVER in os.environ or not SUPPORTED:
        yield {}
        return
    with contextlib.ExitStack() as stack:
        try:
            # The folder has mode 0700.
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="dstune-", ignore_cleanup_errors=True))
            Path(folder, OWNER).write_text(f"{os.getpid()} {idle_seconds}")
        except OSError:
            yield {}
            return
        stack.callback(ForkServer(Path(folder), (), lambda text: None).stop)
        yield {FORK_SERVER: folder}


def rank_imports(config: RunConfig) -> tuple[str, ...]:
    """Return the modules that ranks of this run import besides those of every rank."""
    return ("peft",) if method_of(config.method).adapter else ()


@contextmanager
def fork_server(
    imports: Sequence[str], message: Callable[[str], None], *, warm: bool, restarts: int
) -> Iterator[ForkServer | None]:
    """Yield the server that forks the ranks of a run; None if they start cold.

    It is the one that was offered to this process, or else a new one if the run may be restarted.

    imports: modules besides those of every rank. message: gets one line whenever a rank starts cold. warm, restarts: keys of the
    launcher.
    """
    folder = os.environ.get(FORK_SERVER)
    if not (warm and SUPPORTED and (folder or restarts)):
        yield None
        return
    with offer() as variables:
        folder = folder or variables.get(FORK_SERVER)
        if folder is None:
            message(f"{COLD}: cannot create a private folder in {tempfile.gettempdir()}")
            yield None
            return
        server = ForkServer(Path(folder), imports, message)
        try:
            yield server
        finally:
            if variables:
                server.stop()


def import_environment(env: Mapping[str, str]) -> dict[str, str]:
    """Return the variables of a rank that imports may read: none of that rank alone, none of trackers, and no secret.

    CUDA_VISIBLE_DEVICES is reduced to whether the rank sees a GPU: imports read only that, and the GPUs themselves are looked up
    when the first one is used.
    """
    prefixes = tuple(prefix for tracker in TRACKERS.classes().values() for prefix in tracker.variables)
    variables = {
        name: value
        for name, value in env.items()
        if name not in NOT_FOR_IMPORTS and not (prefixes and name.startswith(prefixes)) and not is_secret(name, value)
    }
    if variables.get(DEVICES):
        variables[DEVICES] = "0"
    return variables


def _is_module(argv: Sequence[str]) -> bool:
    """Return whether the command is `python -u -m MODULE ...`, the form of all ranks that dstune starts."""
    return list(argv[:3]) == [sys.executable, "-u", "-m"]


def _is_readable(descriptor: int, seconds: float = 0.0) -> bool:
    waiting = select.poll()
    waiting.register(descriptor, select.POLLIN)
    return bool(waiting.poll(seconds * 1000))


def _receive(connection: socket.socket, descriptors: list[int] | None = None) -> dict[str, Any] | None:
    """Return the next message, or None if the other end is gone; add the descriptors it carries to `descriptors`."""
    try:
        data, received, _, _ = socket.recv_fds(connection, 1 << 16, 1, socket.MSG_CMSG_CLOEXEC)
    except OSError:
        return None
    if descriptors is not None:
        descriptors += received
    return json.loads(data) if data else None
