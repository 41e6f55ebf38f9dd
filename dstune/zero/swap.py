"""Optimizer states on a disk of the node: ZeRO-Infinity (Rajbhandari et al. 2021, arXiv:2104.07857) as DeepSpeed has it.

Import it where DeepSpeed is imported already.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
from torch.utils import cpp_extension

from dstune.config.schema import OptimizerOffload, ZeroConfig
from dstune.dist import World
from dstune.errors import Problem, UserError

activity = logging.getLogger("dstune.worker")

KEY = "zero.nvme_path"
IN_MEMORY = ("tmpfs", "ramfs")
OPS = ("async_io", "pin_memory")
"""DeepSpeed's sources that are compiled at the first use: 2.5 minutes on one core."""

FILES = 4
"""Bytes on the disk for an element of a weight, of each moment and of a gradient."""


def device(settings: dict[str, Any]) -> str:
    """Where DeepSpeed's `settings` keep optimizer states: `none`, `cpu` or `nvme`."""
    return str(settings["zero_optimization"].get("offload_optimizer", {}).get("device", "none"))


@contextmanager
def own_folder(zero: ZeroConfig, run_dir: Path, world: World) -> Iterator[ZeroConfig]:
    """`zero` with a folder of the run's own on this node as its `nvme_path`, empty, and what reads and writes it compiled;
    as it is where nothing is kept on a disk. The folder goes at the end. Every rank must enter it.

    Raises UserError on all ranks where a node has no such place, only memory behind it, or no compiler.
    """
    if zero.offload_optimizer is not OptimizerOffload.nvme:
        yield zero
        return
    place = Path(zero.nvme_path)
    # A run that was killed has left its files there: the same run finds them by its directory.
    own = place / f"dstune-{os.getuid()}-{hashlib.sha256(str(run_dir.absolute()).encode()).hexdigest()[:12]}"
    problem = None
    if world.local_rank == 0:
        try:
            problem = _unusable(place)
            if problem is None:
                shutil.rmtree(own, ignore_errors=True)
                own.mkdir(mode=0o700)
                _compile(tell=world.is_main)
        except OSError as error:
            problem = Problem(KEY, f"{error.strerror or error}", "name a folder that you may write to", str(place))
        except Exception as error:  # of a compiler or a linker, in whatever words it has
            reason = f"DeepSpeed's asynchronous I/O could not be compiled: {str(error).strip().splitlines()[-1]}"
            problem = Problem("zero.offload_optimizer", reason, LIBRARIES, "nvme")
    try:
        found = [one for one in world.gather(problem) if one is not None]
        if found:
            raise UserError(found[0])
        yield replace(zero, nvme_path=str(own))
    finally:
        if world.local_rank == 0:
            shutil.rmtree(own, ignore_errors=True)


LIBRARIES = (
    "install a C++ compiler, ninja and libaio with its headers (Debian: apt-get install g++ ninja-build libaio-dev)"
)


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
    """The type of the file system that `place` is on; empty where nobody knows."""
    above = [place.resolve(), *place.resolve().parents]
    types = {Path(part.mountpoint): part.fstype for part in psutil.disk_partitions(all=True)}
    return next((types[folder] for folder in above if folder in types), "")


def _compile(tell: bool) -> None:
    """Compile DeepSpeed's asynchronous I/O, or load what was compiled. One process at a time: whoever is killed while compiling
    leaves torch's lock behind, for which every later process would wait for ever."""
    from deepspeed.ops.op_builder import AsyncIOBuilder

    builder = AsyncIOBuilder()
    if not builder.is_compatible(verbose=False):
        raise RuntimeError("libaio is missing")
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root())
    root.mkdir(parents=True, exist_ok=True)
    with (root / "dstune.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        compiling = root / "dstune.compiling"
        if compiling.exists():
            for name in OPS:
                for left in [*root.glob(f"{name}/lock"), *root.glob(f"*/{name}/lock")]:
                    left.unlink(missing_ok=True)
        if tell and not [*root.glob("async_io/*.so"), *root.glob("*/async_io/*.so")]:
            activity.info("compiling DeepSpeed's asynchronous I/O, once: two minutes or more")
        compiling.touch()
        builder.load(verbose=False)
        compiling.unlink()


def check_room(settings: dict[str, Any], trained: int, moments: int, world: World) -> None:
    """Raises UserError on all ranks where a node's disk has no room for the states of `trained` elements of all ranks."""
    if device(settings) != "nvme":
        return
    place = settings["zero_optimization"]["offload_optimizer"]["nvme_path"]
    needed = FILES * (2 + moments) * trained // world.size * world.env.local_size
    free = shutil.disk_usage(place).free
    problem = None
    if world.local_rank == 0 and free < needed:
        reason = f"optimizer states take {needed / 2**30:.1f} GiB of a node's disk, and {free / 2**30:.1f} are free"
        problem = Problem(KEY, reason, "a larger disk, more nodes, or zero.offload_optimizer=cpu", place)
    found = [one for one in world.gather(problem) if one is not None]
    if found:
        raise UserError(found[0])


@contextmanager
def swapped_in(wrapper: Any, number: int, *, write: bool) -> Iterator[None]:
    """While open, the fp32 weights of sub-group `number` of a ZeRO-3 optimizer and what it keeps of them are in memory; with
    `write` what was changed goes back to the disk. Changes nothing where they are in memory anyway."""
    if not wrapper._swappable_optimizer_subgroup(number):
        yield
        return
    wrapper._optimizer_states_and_gradient_swap_in(number)
    try:
        yield
    finally:
        if write:
            wrapper._optimizer_states_and_gradient_swap_out(number)
        else:
            wrapper._release_swap_buffers(number)
