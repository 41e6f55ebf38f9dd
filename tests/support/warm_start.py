"""Commands and ranks that start in a tenth of a second in place of ten: forks of a process that has imported what they import.

Nine tenths of the processor time of a short run are imports of PyTorch, transformers, DeepSpeed and dstune, once for each of its
processes. What is forked here is a child of the process that started it, with its own pid, command line, environment and working
directory under /proc, so that signals, exit codes, sessions, limits and the search for what a launch left behind work as they do
for users. Three differences remain: all forks of a test worker have the same hash seed, modules are there that a command would not
import, and the interpreter is left before it frees them. What concerns these starts cold: `@pytest.mark.cold`. So do other
launchers than dstune's own (SLURM, mpirun, pdsh), and whatever has an environment that could have changed an import.

A warm process that starts others keeps a twin that has done nothing but imports; they are forked from that one. A process becomes
a child of the one that asked, not of the twin, because its parent in between ends while the asking one is a subreaper
(`man 2 PR_SET_CHILD_SUBREAPER`).
"""

from __future__ import annotations

import atexit
import ctypes
import fcntl
import gc
import importlib
import json
import os
import resource
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dstune.launch.local import forking

ROOT = Path(__file__).parents[2]
SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER of linux/prctl.h
HIGH = 500
"""Descriptors from here on are in use while a process is made; none that is given to it has such a number."""
IMPORTS = ("deepspeed.runtime.engine", "numpy", "transformers.models.llama.modeling_llama", "dstune.rank.worker",
           *(f"dstune.cli.{verb}" for verb in ("train", "evaluate", "predict", "export", "plan", "generate", "report")),
           "dstune.config.compose", "dstune.report.command")  # fmt: skip
"""Not wandb: it makes a folder as it is imported, which the first fork that ends would remove for all others."""
FREE = ("DSTUNE_", "GLOO_", "LOCAL_", "MASTER_", "PYTEST_", "WANDB_")
FREE_NAMES = {"RANK", "WORLD_SIZE", "PYTHONPATH", "PYTHONSAFEPATH", "PYTHONUNBUFFERED", "XDG_CONFIG_HOME", "TMPDIR", "COLUMNS",
              "NO_COLOR", "TERM"}  # fmt: skip
"""Variables that are read when they are needed. Any other that differs from what the imports have seen has a process start cold;
so have another tree in PYTHONPATH, and `DSTUNE_FAULT`, which a `sitecustomize` reads (`support/struck.py`)."""
IMPORTED = ("CUDA_", "DS_", "HF_", "LD_", "MKL_", "OMP_", "PYTORCH_", "TORCH", "TRANSFORMERS_")
USUAL = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
"""Of the commands and ranks of tests."""


def same_imports(env: Mapping[str, str], base: Mapping[str, str], also: frozenset[str]) -> bool:
    """Return whether a process with `env` would have imported what one with `base` has. also: what ranks are given beside it."""
    path = set(env.get("PYTHONPATH", "").split(os.pathsep))
    if "DSTUNE_FAULT" in env or not path <= {"", str(ROOT), str(ROOT / "tests")}:
        return False
    for name, value in env.items():
        if name not in FREE_NAMES and not name.startswith(FREE) and base.get(name) != value:
            return False
    return all(name in env for name in base if name.startswith(IMPORTED) and name not in also)


def program(argv: Sequence[str]) -> list[str] | None:
    """Return `-m MODULE ...` or `FILE ...` after the interpreter and its `-u`, where that may start warm."""
    if not argv or argv[0] != sys.executable:
        return None
    words = [str(word) for word in argv[1 + _unbuffered(argv) :]]
    if words[:1] == ["-m"]:
        return words if words[1] == "dstune" or words[1].startswith("dstune.") else None
    if words and Path(words[0]).parent.parent == ROOT / "tests":
        return words
    return None


def _unbuffered(argv: Sequence[str]) -> bool:
    return list(argv[1:2]) == ["-u"]


class Source:
    """The end of a socket at whose other end a warm process waits, for this process alone."""

    def __init__(self, end: socket.socket, base: Mapping[str, str], also: frozenset[str]):
        self.end, self.base, self.also = end, base, also
        self.lock, self.owner = threading.Lock(), os.getpid()

    def start(self, words: Sequence[str], fds: Sequence[int], **how: Any) -> int:
        """Return the pid of the new child of this process. Raises OSError where there is none, then and later."""
        request = json.dumps({"words": words, "parent": os.getpid(), **how}).encode()
        with self.lock:
            if self.owner != os.getpid():
                raise BrokenPipeError("this process was forked from the one that the warm process knows")
            ctypes.CDLL(None).prctl(SUBREAPER, 1, 0, 0, 0)
            try:
                socket.send_fds(self.end, [len(request).to_bytes(4)], list(fds))
                self.end.sendall(request)
                answer = self.end.recv(32)
            except BaseException:
                self.end.close()  # an answer that comes after all would be taken for that of the next request
                raise
            finally:
                ctypes.CDLL(None).prctl(SUBREAPER, 0, 0, 0, 0)
        if answer in (b"", b"0"):
            raise BrokenPipeError("the warm process made none")
        return int(answer)


source: Source | None = None
"""What the processes of this one are forked from; the first that may start warm makes it."""
cold = threading.Event()
between_tests: dict[str, str] = {}
"""The environment that every test finds. What one of them sets, or imports for it, the others have not: a warm process that had it
would serve nobody else."""
_OwnPopen = subprocess.Popen


class Popen(_OwnPopen):  # type: ignore[type-arg]
    """`subprocess.Popen`, whose process is forked where that is possible."""

    def _execute_child(self, args: Any, executable: Any, preexec_fn: Any, close_fds: bool, pass_fds: Any, cwd: Any, env: Any,
                       startupinfo: Any, creationflags: Any, shell: bool, p2cread: int, p2cwrite: int, c2pread: int,
                       c2pwrite: int, errread: int, errwrite: int, restore_signals: bool, gid: Any, gids: Any, uid: Any,
                       umask: int, start_new_session: bool, process_group: int) -> None:  # fmt: skip
        further = (startupinfo, creationflags, shell, p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite, restore_signals,
                gid, gids, uid, umask, start_new_session, process_group)  # fmt: skip
        plain = preexec_fn is executable is gid is gids is uid is None and not shell and close_fds and umask == -1
        plain = plain and process_group == -1 and not cold.is_set() and all(number < HIGH for number in pass_fds)
        words = program(list(args)) if plain and not isinstance(args, str | bytes | os.PathLike) else None
        environment, folder = dict(os.environ if env is None else env), os.path.abspath(cwd or ".")
        source = _source(environment) if words is not None and os.path.isdir(folder) else None
        if source is not None and words is not None:
            inherited = (p2cread, c2pwrite, errwrite)
            fds = [number if descriptor == -1 else descriptor for number, descriptor in enumerate(inherited)]
            how = {
                "env": environment,
                "session": start_new_session,
                "unbuffered": _unbuffered(args),
                **forking.describe(folder),
            }
            try:
                self.pid = source.start(words, [*fds, *pass_fds], numbers=[0, 1, 2, *pass_fds], **how)
            except OSError as error:
                if "pytest" in sys.modules:  # elsewhere it would look like the command's own output
                    warnings.warn(f"no warm process: {words[:2]} starts cold ({error})", stacklevel=2)
            else:
                self._child_created = True
                self._close_pipe_fds(p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite)
                return
        super()._execute_child(args, executable, preexec_fn, close_fds, pass_fds, cwd, env, *further)


def run(command: Sequence[str], **options: Any) -> subprocess.CompletedProcess[Any]:
    """Return `subprocess.run` of what may start warm."""
    input, timeout = options.pop("input", None), options.pop("timeout", None)
    if options.pop("capture_output", False):
        options |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with Popen(command, **options) as process:
        try:
            out, err = process.communicate(input, timeout)
        except BaseException:
            process.kill()
            raise
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def _source(env: Mapping[str, str]) -> Source | None:
    global source
    if source is None and sys.platform == "linux" and resource.getrlimit(resource.RLIMIT_NOFILE)[0] > 2 * HIGH:
        from dstune.launch.commands import ALWAYS, UNLESS_SET

        usual = between_tests or os.environ
        own_variables = {
            name: value for name, value in usual.items() if name not in FREE_NAMES and not name.startswith(FREE)
        }
        base = {**UNLESS_SET, **ALWAYS, **own_variables, **USUAL}
        also = frozenset({*ALWAYS, *UNLESS_SET} - {*own_variables, *USUAL})
        end, other = socket.socketpair()
        command = [sys.executable, "-u", __file__, str(other.fileno()), "x" * 8000]
        environment = {**forking.padding(), **base, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
        quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL}
        _OwnPopen(command, env=environment, pass_fds=[other.fileno()], **quiet)  # type: ignore[call-overload]
        other.close()
        source = Source(end, base, also)
        base_text = json.dumps([base, sorted(also)]).encode()  # not on its command line, which everybody may read
        end.sendall(len(base_text).to_bytes(4) + base_text)
    return source if source is not None and same_imports(env, source.base, source.also) else None


# -- in the warm process -----------------------------------------------------------------------------------------------

places: forking.Places | None = None
"""Where its command line and its environment are."""


def serve(end: socket.socket, base: Mapping[str, str], also: frozenset[str]) -> list[str]:
    """Fork for each request. Returns in the fork alone, with what it is to run; this process ends with the asking one."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    while True:
        head, fds, _, _ = socket.recv_fds(end, 4, 64)
        if len(head) < 4:
            os._exit(0)
        request = json.loads(_exactly(end, int.from_bytes(head)))
        reading, writing = os.pipe()
        between = _fork()
        if between == 0:
            pid = _fork()
            if pid == 0:
                end.close()
                become(request, fds, base, also)
                return request["words"]
            os.write(writing, str(max(pid, 0)).encode())
            os._exit(0)
        for number in (writing, *fds):
            os.close(number)
        if between > 0:
            os.waitpid(between, 0)
        end.sendall(os.read(reading, 32) or b"0")
        os.close(reading)


def _fork() -> int:
    try:
        return os.fork()
    except OSError:
        return -1


def _exactly(end: socket.socket, size: int) -> bytes:
    content = b""
    while len(content) < size:
        part = end.recv(size - len(content))
        if not part:
            os._exit(0)
        content += part
    return content


def become(request: Mapping[str, Any], fds: Sequence[int], base: Mapping[str, str], also: frozenset[str]) -> None:
    """Give this fork everything that it would have been started with."""
    global source
    if request["session"]:
        os.setsid()
    high = [_dup_high(fd) for fd in fds]
    os.closerange(0, HIGH)
    for fd, number in zip(high, request["numbers"], strict=True):
        os.dup2(fd, number)
    os.closerange(HIGH, 2 * HIGH)
    forking.apply_request(request)
    words: list[str] = request["words"]
    if not (request["unbuffered"] or "PYTHONUNBUFFERED" in request["env"]):
        sys.stdout = sys.__stdout__ = open(1, "w", closefd=False)  # type: ignore[misc]  # noqa: SIM115
    assert places is not None
    places.show([sys.executable, *["-u"] * request["unbuffered"], *words], request["env"])
    own_folders = {str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "support")}
    sys.path[:] = [path for path in sys.path if path not in own_folders]
    sys.path[:0] = [path for path in request["env"].get("PYTHONPATH", "").split(os.pathsep) if path]
    if "PYTHONSAFEPATH" not in request["env"]:
        sys.path.insert(0, os.getcwd() if words[0] == "-m" else str(Path(words[0]).parent))
    deadline = time.monotonic() + 10
    while os.getppid() != request["parent"]:  # for a moment it is the one that ends
        if time.monotonic() > deadline:
            os._exit(1)
        time.sleep(0.0005)
    # These commands start ranks or engines.
    if words[0] == "-m" and (words[1] == "dstune" or words[1].startswith("dstune.serve.")):
        ends = [end.detach() for end in socket.socketpair()]
        if os.fork() == 0:
            server_end = _dup_high(ends[1])
            os.closerange(0, HIGH)
            for _ in range(3):
                os.open(os.devnull, os.O_RDWR)
            places.show([sys.executable, __file__], {})
            words[:] = serve(socket.socket(fileno=server_end), base, also)
            return
        source = Source(socket.socket(fileno=_dup_high(ends[0])), base, also)
        for end in ends:
            os.close(end)
        subprocess.Popen = Popen  # type: ignore[misc]


def _dup_high(fd: int) -> int:
    return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, HIGH)


def main() -> None:
    global places
    end = socket.socket(fileno=int(sys.argv[1]))
    places = forking.Places()
    base, also = json.loads(_exactly(end, int.from_bytes(_exactly(end, 4))))
    for name in IMPORTS:
        importlib.import_module(name)
    gc.freeze()  # what is collected in a fork alone is not copied for it
    words = serve(end, base, frozenset(also))
    code: Any = 0
    try:
        if words[0] == "-m":
            sys.argv[:] = words[1:]
            sys.modules.pop("dstune.__main__" if words[1] == "dstune" else words[1], None)
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv[:] = words
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit as error:
        code = error.code or 0
    if not isinstance(code, int):
        print(code, file=sys.stderr)
        code = 1
    # As the interpreter ends, but for the 0.6 s that it takes to free what was imported.
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code & 0xFF)


if __name__ == "__main__":
    # One module, whatever name it is known by: what is forked changes its state.
    sys.modules["support.warm_start"] = sys.modules["__main__"]
    main()
