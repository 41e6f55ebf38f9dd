"""Keeps optimizer states on a disk of the node: DeepSpeed's ZeRO-Infinity (Rajbhandari et al. 2021, arXiv:2104.07857).

Import this module only where DeepSpeed is imported already.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import resource
import shutil
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import psutil
from torch import nn
from torch.utils import cpp_extension

from dstune.config.schema import OptimizerOffload, ZeroConfig
from dstune.config.zero_rules import swap_buffers
from dstune.core.disk import fix_of_unwritable_folder
from dstune.core.distributed import World
from dstune.core.errors import Problem, UserError
from dstune.core.files import append, open_plain, try_lock

activity = logging.getLogger("dstune.worker")

KEY = "zero.nvme_path"
IN_MEMORY = ("tmpfs", "ramfs")
OPS = ("async_io", "pin_memory")
"""DeepSpeed's extensions that are compiled on first use, which takes 2.5 minutes on one core."""

BYTES = 4
"""Bytes of an element on the disk and in the buffers, which are all fp32."""

LIBRARIES = (
    "install a C++ compiler, ninja and libaio with its headers (Debian: apt-get install g++ ninja-build libaio-dev)"
)


def device(settings: dict[str, Any]) -> str:
    """Return where DeepSpeed's `settings` keep optimizer states: `none`, `cpu` or `nvme`."""
    return str(settings["zero_optimization"].get("offload_optimizer", {}).get("device", "none"))


# -- before the engine -------------------------------------------------------------------------------------------------


@contextmanager
def own_folder(zero: ZeroConfig, run_dir: Path, world: World) -> Iterator[ZeroConfig]:
    """Yield `zero` with a new, empty folder of this run as its `nvme_path`, and compile DeepSpeed's asynchronous I/O.

    Yields `zero` unchanged if optimizer states are not on a disk. Folders that killed runs left behind are removed at the start,
    this run's folder at the end. Every rank must enter it.

    Raises UserError on all ranks if a node lacks the folder `zero.nvme_path`, if that folder is in memory, or if there is no
    compiler.
    """
    if zero.offload_optimizer is not OptimizerOffload.nvme:
        yield zero
        return
    place = Path(zero.nvme_path)
    name = hashlib.sha256(f"{socket.gethostname()} {run_dir.absolute()}".encode()).hexdigest()[:12]
    run_folder = place / f"{_prefix()}{name}"
    problem, lock = None, None
    if world.local_rank == 0:
        try:
            problem = _unusable(place)
            if problem is None:
                _remove_abandoned(place)
                run_folder.mkdir(mode=0o700)
                lock = _lock(run_folder)
        except OSError as error:
            problem = Problem(KEY, f"{error.strerror or error}", fix_of_unwritable_folder(error), str(place))
    try:
        _raise_everywhere(problem, world)
        _raise_everywhere(_compile_problem(show_message=world.is_main), world)
        yield replace(zero, nvme_path=str(run_folder))
    finally:
        if lock is not None:
            shutil.rmtree(run_folder, ignore_errors=True)
            os.close(lock)


def _raise_everywhere(problem: Problem | None, world: World) -> None:
    """Raise UserError on all ranks, with the problem of the first rank that has one. A collective."""
    problems = [entry for entry in world.gather(None if problem is None else asdict(problem)) if entry is not None]
    if problems:
        raise UserError(Problem(**problems[0]))


def _prefix() -> str:
    return f"dstune-{os.getuid()}-"


def _lock(folder: Path) -> int | None:
    """Lock `folder` until the returned descriptor is closed or this process ends; return None if another process has the lock.

    Raises UserError if the lock is a link or not a regular file, and OSError like `os.open`.
    """
    return try_lock(open_plain(folder / "lock", os.O_CREAT | os.O_RDWR, 0o600))


def _remove_abandoned(place: Path) -> None:
    """Remove the folders that killed runs of this user left in `place`. Other users may write to `place` too, so a folder stays if
    it is a link, belongs to another user, or contains a lock that is not a regular file."""
    for folder in place.glob(f"{_prefix()}*"):
        try:
            status = folder.lstat()
            if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
                continue
            descriptor = _lock(folder)
        except (UserError, FileNotFoundError):  # FileNotFoundError: another run has removed it meanwhile
            continue
        if descriptor is not None:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(descriptor)


def _unusable(place: Path) -> Problem | None:
    """Return why optimizer states cannot be kept in `place`; None if they can."""
    if not place.is_dir():
        return Problem(
            KEY, "there is no such folder on this node", "make it, or name another on a local disk", str(place)
        )
    file_system = _file_system(place)
    if file_system in IN_MEMORY:
        reason = f"it is on {file_system}, which keeps files in memory, not on a disk"
        return Problem(KEY, reason, "a folder on a local disk, or zero.offload_optimizer=cpu", str(place))
    return None


def _file_system(place: Path) -> str:
    """Return the type of the file system that `place` is on; empty if it cannot be found out."""
    above = [place.resolve(), *place.resolve().parents]
    types = {Path(part.mountpoint): part.fstype for part in psutil.disk_partitions(all=True)}
    return next((types[folder] for folder in above if folder in types), "")


def _compile_problem(*, show_message: bool) -> Problem | None:
    """Compile or load DeepSpeed's asynchronous I/O; return why that failed, or None."""
    try:
        _compile(show_message)
    except Exception as error:  # compilers, linkers and disks raise many types
        message = str(error).strip() or type(error).__name__
        reason = f"DeepSpeed's asynchronous I/O cannot be compiled here: {message.splitlines()[-1]}"
        return Problem("zero.offload_optimizer", reason, LIBRARIES, "nvme")
    return None


def _compile(show_message: bool) -> None:
    """Compile DeepSpeed's asynchronous I/O, or load it if it is compiled; one process of a machine at a time.

    The lock of this function rules out that torch's own lock file belongs to a running process: one was killed while it compiled.
    The file is removed, since every later process would wait for it forever.
    """
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if missing := [tool for tool in ("g++", "ninja") if shutil.which(tool) is None]:
        raise RuntimeError(f"{' and '.join(missing)} are missing")
    builder = AsyncIOBuilder()
    if not builder.is_compatible(verbose=False):
        raise RuntimeError("libaio or its headers are missing")
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root())
    root.mkdir(parents=True, exist_ok=True)
    with append(root / "dstune.lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for name in OPS:
            for stale_lock in [*root.glob(f"{name}/lock"), *root.glob(f"*/{name}/lock")]:
                stale_lock.unlink(missing_ok=True)
        if show_message and not [*root.glob("async_io/*.so"), *root.glob("*/async_io/*.so")]:
            activity.info("compiling DeepSpeed's asynchronous I/O, once: two minutes or more")
        builder.load(verbose=False)


def check_disk_space(settings: dict[str, Any], shares: list[int], moments: int, world: World) -> None:
    """Raise UserError on all ranks if a node's disk has no room for the states, or if a rank may not lock enough memory for the
    buffers that states pass through.

    shares: elements that this rank has of each trained tensor. moments: how many tensors the optimizer keeps for each.
    """
    if device(settings) != "nvme":
        return
    zero = settings["zero_optimization"]
    place = zero["offload_optimizer"]["nvme_path"]
    needed = BYTES * (2 + moments) * sum(shares) * world.env.local_size  # weights, moments, gradients
    free = shutil.disk_usage(place).free
    problem = None
    if world.local_rank == 0 and free < needed:
        reason = f"optimizer states need {needed / 2**30:.1f} GiB on each node's disk, but {free / 2**30:.1f} are free"
        problem = Problem(KEY, reason, "a larger disk, more nodes, or zero.offload_optimizer=cpu", place)
    buffers = swap_buffers(moments) * BYTES * min(sum(shares), max(shares, default=0) + zero["sub_group_size"])
    allowed, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if problem is None and os.geteuid() != 0 and allowed != resource.RLIM_INFINITY and allowed < buffers:
        reason = (
            f"its buffers need up to {buffers / 2**20:.0f} MiB of locked memory, but {allowed / 2**20:.0f} are allowed"
        )
        fix = "ulimit -l unlimited (limits.conf: memlock; systemd: LimitMEMLOCK), or zero.offload_optimizer=cpu"
        problem = Problem("zero.offload_optimizer", reason, fix, "nvme")
    _raise_everywhere(problem, world)


# -- beside the engine -------------------------------------------------------------------------------------------------


@contextmanager
def swapped_in(wrapper: Any, number: int, *, write: bool) -> Iterator[None]:
    """Hold the fp32 weights and optimizer states of ZeRO-3's sub-group `number` in memory within the block.

    write: write changes back to the disk at the end, unless the block raised. Does nothing if they are not on a disk.
    """
    if not wrapper._swappable_optimizer_subgroup(number):
        yield
        return
    wrapper._optimizer_states_and_gradient_swap_in(number)
    succeeded = False
    try:
        yield
        succeeded = True
    finally:
        if write and succeeded:
            wrapper._optimizer_states_and_gradient_swap_out(number)
        else:
            wrapper._release_swap_buffers(number)


class FirstGradients:
    """Checks that every trained tensor gets a gradient in the first step. For a tensor without one, DeepSpeed would take the old
    content of the buffer for its gradient, and update its weights with it."""

    def __init__(self, trained: dict[str, nn.Parameter]):
        self._waiting = set(trained)
        self._hooks = {
            name: parameter.register_hook(lambda gradient, name=name: self._got(name))
            for name, parameter in trained.items()
        }

    def _got(self, name: str) -> None:
        self._waiting.discard(name)
        self._hooks.pop(name).remove()

    def refuse_missing(self, world: World) -> None:
        """Raise UserError on all ranks if a trained tensor got no gradient on one of them."""
        names = sorted({name for names in world.gather(sorted(self._waiting)) for name in names})
        if names:
            further = f" and {len(names) - 1} more" if names[1:] else ""
            reason = f"{names[0]}{further} got no gradient in the first step; with states on a disk, every trained tensor needs one"
            fix = "zero.offload_optimizer=cpu, or freeze the unused tensors with method=freeze"
            raise UserError(Problem("zero.offload_optimizer", reason, fix, "nvme"))


def check_written(wrapper: Any, world: World) -> None:
    """Raise UserError on all ranks if the first update could not write all states."""
    if any(missing_bytes := world.gather(unwritten(wrapper))):
        reason = f"{sum(missing_bytes) / 2**20:.0f} MiB of the optimizer states could not be written to the disk"
        raise UserError(Problem(KEY, reason, "free some space there, or name a folder on a larger disk"))


def unwritten(wrapper: Any) -> int:
    """Return how many bytes are missing from this rank's files of states. DeepSpeed counts the writes that ended, not those that a
    full disk refused. After the first update all files exist, and later updates overwrite them."""
    swapper, missing_bytes = wrapper.optimizer_swapper, 0
    for info in swapper.swap_params_info.values():
        files = [(path, info.numel()) for path in info.get_swap_paths()]
        files += [(gradient.path, gradient.length) for gradient in info.swapped_gradients.values()]
        for path, elements in files:
            status = os.stat(path)
            # On a full disk a file is too short, or has holes in place of the refused blocks.
            missing_bytes += max(0, BYTES * elements - min(status.st_size, 512 * status.st_blocks))
    return missing_bytes
