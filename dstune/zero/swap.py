"""Optimizer states on a disk of the node: ZeRO-Infinity (Rajbhandari et al. 2021, arXiv:2104.07857) as DeepSpeed has it.

Import it where DeepSpeed is imported already.
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
from dstune.core.distributed import World
from dstune.core.errors import Problem, UserError
from dstune.core.files import append, open_plain, try_lock

activity = logging.getLogger("dstune.worker")

KEY = "zero.nvme_path"
IN_MEMORY = ("tmpfs", "ramfs")
OPS = ("async_io", "pin_memory")
"""DeepSpeed's sources that are compiled at the first use: 2.5 minutes on one core."""

BYTES = 4
"""Of an element, on the disk and in the buffers: all is fp32."""

LIBRARIES = (
    "install a C++ compiler, ninja and libaio with its headers (Debian: apt-get install g++ ninja-build libaio-dev)"
)


def device(settings: dict[str, Any]) -> str:
    """Return where DeepSpeed's `settings` keep optimizer states: `none`, `cpu` or `nvme`."""
    return str(settings["zero_optimization"].get("offload_optimizer", {}).get("device", "none"))


# -- before the engine -------------------------------------------------------------------------------------------------


@contextmanager
def own_folder(zero: ZeroConfig, run_dir: Path, world: World) -> Iterator[ZeroConfig]:
    """Yield `zero` with a folder of the run's own on this node as its `nvme_path`, empty, and what reads and writes it compiled; as
    it is where nothing is kept on a disk. The folder goes at the end, and at the start those of runs that were killed. Every rank
    must enter it.

    Raises UserError on all ranks where a node has no such place, only memory behind it, or no compiler.
    """
    if zero.offload_optimizer is not OptimizerOffload.nvme:
        yield zero
        return
    place = Path(zero.nvme_path)
    name = hashlib.sha256(f"{socket.gethostname()} {run_dir.absolute()}".encode()).hexdigest()[:12]
    run_folder = place / f"{_prefix()}{name}"
    problem, held = None, None
    if world.local_rank == 0:
        try:
            problem = _unusable(place)
            if problem is None:
                _remove_abandoned(place)
                run_folder.mkdir(mode=0o700)
                held = _lock(run_folder)
        except OSError as error:
            problem = Problem(KEY, f"{error.strerror or error}", "name a folder that you may write to", str(place))
    try:
        _raise_everywhere(problem, world)
        _raise_everywhere(_compiled(show_message=world.is_main), world)
        yield replace(zero, nvme_path=str(run_folder))
    finally:
        if held is not None:
            shutil.rmtree(run_folder, ignore_errors=True)
            os.close(held)


def _raise_everywhere(problem: Problem | None, world: World) -> None:
    """Raises UserError on all ranks with the first problem of any."""
    problems = [entry for entry in world.gather(None if problem is None else asdict(problem)) if entry is not None]
    if problems:
        raise UserError(Problem(**problems[0]))


def _prefix() -> str:
    return f"dstune-{os.getuid()}-"


def _lock(folder: Path) -> int | None:
    """Hold `folder` until the returned descriptor is closed or this process ends; None if another process holds it.

    Raises UserError where the lock is a link or no file, OSError as `os.open`.
    """
    return try_lock(open_plain(folder / "lock", os.O_CREAT | os.O_RDWR, 0o600))


def _remove_abandoned(place: Path) -> None:
    """Remove what killed runs of this user left here. Others may write to `place`: a folder that is a link or another user's,
    or has a lock that is none, stays."""
    for folder in place.glob(f"{_prefix()}*"):
        try:
            status = folder.lstat()
            if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
                continue
            descriptor = _lock(folder)
        except (UserError, FileNotFoundError):  # or removed by another run by now
            continue
        if descriptor is not None:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(descriptor)


def _unusable(place: Path) -> Problem | None:
    if not place.is_dir():
        return Problem(
            KEY, "there is no such folder on this node", "make it, or name another on a local disk", str(place)
        )
    file_system = _file_system(place)
    if file_system in IN_MEMORY:
        reason = f"it is of type {file_system}: what is put there lies in memory"
        return Problem(KEY, reason, "a folder on a local disk, or zero.offload_optimizer=cpu", str(place))
    return None


def _file_system(place: Path) -> str:
    """Return the type of the file system that `place` is on; empty where nobody knows."""
    above = [place.resolve(), *place.resolve().parents]
    types = {Path(part.mountpoint): part.fstype for part in psutil.disk_partitions(all=True)}
    return next((types[folder] for folder in above if folder in types), "")


def _compiled(*, show_message: bool) -> Problem | None:
    """Compile DeepSpeed's asynchronous I/O, or load what was compiled; return what keeps it from that."""
    try:
        _compile(show_message)
    except Exception as error:  # of a compiler, a linker or a disk, in whatever words it has
        message = str(error).strip() or type(error).__name__
        reason = f"DeepSpeed's asynchronous I/O cannot be compiled here: {message.splitlines()[-1]}"
        return Problem("zero.offload_optimizer", reason, LIBRARIES, "nvme")
    return None


def _compile(show_message: bool) -> None:
    """Compile DeepSpeed's asynchronous I/O, or load the compiled one; one process of a machine at a time.

    Under this lock, a lock file of torch's can only be left over from a process that was killed while it compiled. It is
    removed, since every later process would wait for it for ever."""
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
    """Raises UserError on all ranks where a node's disk has no room for the states, or a rank may not lock the memory of the
    buffers that they go through.

    shares: elements that this rank has of each trained tensor. moments: tensors that the optimizer keeps of each.
    """
    if device(settings) != "nvme":
        return
    zero = settings["zero_optimization"]
    place = zero["offload_optimizer"]["nvme_path"]
    needed = BYTES * (2 + moments) * sum(shares) * world.env.local_size  # weights, moments, gradients
    free = shutil.disk_usage(place).free
    problem = None
    if world.local_rank == 0 and free < needed:
        reason = f"optimizer states take {needed / 2**30:.1f} GiB of a node's disk, and {free / 2**30:.1f} are free"
        problem = Problem(KEY, reason, "a larger disk, more nodes, or zero.offload_optimizer=cpu", place)
    buffers = swap_buffers(moments) * BYTES * min(sum(shares), max(shares, default=0) + zero["sub_group_size"])
    allowed, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if problem is None and os.geteuid() != 0 and allowed != resource.RLIM_INFINITY and allowed < buffers:
        reason = (
            f"its buffers take up to {buffers / 2**20:.0f} MiB of locked memory, and {allowed / 2**20:.0f} are allowed"
        )
        fix = "ulimit -l unlimited (limits.conf: memlock; systemd: LimitMEMLOCK), or zero.offload_optimizer=cpu"
        problem = Problem("zero.offload_optimizer", reason, fix, "nvme")
    _raise_everywhere(problem, world)


# -- beside the engine -------------------------------------------------------------------------------------------------


@contextmanager
def swapped_in(wrapper: Any, number: int, *, write: bool) -> Iterator[None]:
    """Hold the fp32 weights of sub-group `number` of a ZeRO-3 optimizer and what it keeps of them in memory within the block;
    with `write` what was changed goes back to the disk, unless an error ended it. Changes nothing where they are in memory
    anyway."""
    if not wrapper._swappable_optimizer_subgroup(number):
        yield
        return
    wrapper._optimizer_states_and_gradient_swap_in(number)
    done = False
    try:
        yield
        done = True
    finally:
        if write and done:
            wrapper._optimizer_states_and_gradient_swap_out(number)
        else:
            wrapper._release_swap_buffers(number)


class FirstGradients:
    """Which trained tensors have got a gradient. DeepSpeed takes what a buffer held before for that of a tensor that got none, and
    moves its weights, so every one has to get one in the first step."""

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
        """Raises UserError on all ranks if a trained tensor has had no gradient on one of them."""
        names = sorted({name for names in world.gather(sorted(self._waiting)) for name in names})
        if names:
            further = f" and {len(names) - 1} more" if names[1:] else ""
            reason = f"{names[0]}{further} got no gradient in the first step, and states on a disk need one of every trained tensor"
            fix = "zero.offload_optimizer=cpu, or method=freeze for what is not used"
            raise UserError(Problem("zero.offload_optimizer", reason, fix, "nvme"))


def check_written(wrapper: Any, world: World) -> None:
    """Raises UserError on all ranks where the first update could not write all states."""
    if any(lacking := world.gather(unwritten(wrapper))):
        reason = f"the disk did not take {sum(lacking) / 2**20:.0f} MiB of the optimizer states"
        raise UserError(Problem(KEY, reason, "free some space there, or name a folder on a larger disk"))


def unwritten(wrapper: Any) -> int:
    """Return the bytes that this rank's files of states lack. DeepSpeed counts the writes that have ended, not those that a full
    disk has refused: after the first update every file is there, and later ones write over it."""
    swapper, lacking = wrapper.optimizer_swapper, 0
    for info in swapper.swap_params_info.values():
        files = [(path, info.numel()) for path in info.get_swap_paths()]
        files += [(gradient.path, gradient.length) for gradient in info.swapped_gradients.values()]
        for path, elements in files:
            status = os.stat(path)
            # A file that was cut short, or has holes where blocks were refused.
            lacking += max(0, BYTES * elements - min(status.st_size, 512 * status.st_blocks))
    return lacking
