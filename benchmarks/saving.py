"""How long a save holds the training up: the ways to write a checkpoint in the background, side by side.

    python benchmarks/saving.py                  # 1.2 GB of states in one process; about two minutes
    python benchmarks/saving.py --gb 4 --folder /mnt/disk

A step is a matrix product that stands for forward and backward pass, then an update of every tensor in place, as an
optimizer does: what is saved must be the states of one moment. "Held up" is what a step with a save takes longer than one
without: the call, what the update has to wait for, and what it loses to the writing beside it where there is no spare core;
"blocked" is the first two alone. Every file is on the disk (fsync) when a save counts as done, and
ours is hashed and read back too. The content of every save is compared with the states that it was asked for.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

States = dict[str, torch.Tensor]
FILES = 4
"""Files that the states are spread over, as over the shards of a checkpoint."""


class Ours:
    """`checkpoint.mode`: sync or async."""

    def __init__(self, folder: Path, background: bool):
        import deepspeed  # noqa: F401  (its shards are written)

        from dstune.zero.shard_files import ShardFiles

        self.files, self.folder, self.background = ShardFiles(), folder, background
        self.thread: threading.Thread | None = None

    def save(self, states: States, name: str) -> None:
        folder = self.folder / name
        folder.mkdir()
        save = self.files.begin(folder, background=self.background)
        keys = list(states)
        for number in range(FILES):
            self.files.save({key: states[key] for key in keys[number::FILES]}, str(folder / f"{number}.pt"))
        self.files.end()
        if self.background:
            self.thread = threading.Thread(target=save.work_off)
            self.thread.start()

    def before_update(self) -> None:
        self.files.wait_for_copies()

    def done(self) -> None:
        if self.thread is not None:
            self.thread.join()

    def load(self, name: str) -> States:
        from dstune.zero.safe_load import load

        return {key: value for file in (self.folder / name).iterdir() for key, value in load(file).items()}


class Plain(Ours):
    """torch.save and fsync, as DeepSpeed's default writer does without the fsync."""

    def save(self, states: States, name: str) -> None:
        folder = self.folder / name
        folder.mkdir()
        keys = list(states)
        for number in range(FILES):
            path = folder / f"{number}.pt"
            torch.save({key: states[key] for key in keys[number::FILES]}, path)
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)


class Distributed:
    """torch.distributed.checkpoint.async_save."""

    def __init__(self, folder: Path, kind: str):
        import torch.distributed as dist
        from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", "29811")
        if not dist.is_initialized():
            dist.init_process_group("gloo", rank=0, world_size=1)
        self.folder, self.kind, self.future = folder, AsyncCheckpointerType(kind), None

    def save(self, states: States, name: str) -> None:
        import torch.distributed.checkpoint as dcp

        writer = dcp.FileSystemWriter(self.folder / name, sync_files=True)
        future = dcp.async_save(dict(states), storage_writer=writer, async_checkpointer_type=self.kind)
        self.future = getattr(future, "upload_completion", future)

    def before_update(self) -> None: ...

    def done(self) -> None:
        assert self.future is not None
        self.future.result()

    def load(self, name: str) -> States:
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint.filesystem import FileSystemReader

        metadata = FileSystemReader(self.folder / name).read_metadata().state_dict_metadata
        states = {key: torch.empty(value.size, dtype=value.properties.dtype) for key, value in metadata.items()}
        dcp.load(states, checkpoint_id=self.folder / name)
        return states


class DeepSpeedFast(Plain):
    """DeepSpeed's fast writer (the decoupled one runs it in a process of its own)."""

    def __init__(self, folder: Path):
        from deepspeed.ops.op_builder import AsyncIOBuilder

        if not AsyncIOBuilder().is_compatible(verbose=False):
            raise RuntimeError("its async_io op cannot be built here: it needs libaio-dev and a compiler")
        raise RuntimeError("it can be built here; measure it with checkpoint.writer in DeepSpeed's settings")


WAYS: dict[str, Callable[[Path], Any]] = {
    "torch.save + fsync": lambda folder: Plain(folder, False),
    "checkpoint.mode=sync": lambda folder: Ours(folder, False),
    "checkpoint.mode=async": lambda folder: Ours(folder, True),
    "torch DCP, thread": lambda folder: Distributed(folder, "thread"),
    "torch DCP, process": lambda folder: Distributed(folder, "process"),
    "DeepSpeed fast writer": DeepSpeedFast,
}


def step(states: States, work: list[torch.Tensor], before_update: Callable[[], None]) -> None:
    first, second = work
    for _ in range(4):
        first @ second
    before_update()
    for tensor in states.values():
        tensor.mul_(0.999)


def wait_for(way: Any, ended: threading.Event) -> None:
    try:
        way.done()
    finally:
        ended.set()


def measure(name: str, folder: Path, gigabytes: float, saves: int) -> str:
    states = {f"t{i}": torch.randn(int(gigabytes * 1e9 / 4 / 16)) for i in range(16)}
    work = [torch.randn(1500, 1500), torch.randn(1500, 1500)]
    folder.mkdir()
    try:
        way = WAYS[name](folder)
    except (RuntimeError, ImportError) as error:
        return f"| {name} | not measured: {error} | | | |"
    plain = []
    for _ in range(6):
        began = time.perf_counter()
        step(states, work, lambda: None)
        plain.append(time.perf_counter() - began)
    usual = statistics.median(plain[1:])
    held, blocked, whole, slow = [], [], [], []

    def wait() -> None:
        wait_started = time.perf_counter()
        way.before_update()
        blocked[-1] += time.perf_counter() - wait_started

    for number in range(saves):
        original = {key: value.clone() for key, value in states.items()}
        began = time.perf_counter()
        way.save(states, str(number))
        blocked.append(time.perf_counter() - began)
        step(states, work, wait)
        held.append(time.perf_counter() - began - usual)
        during = []
        ended = threading.Event()
        waiter = threading.Thread(target=wait_for, args=(way, ended))
        waiter.start()
        while not ended.is_set():
            step_began = time.perf_counter()
            step(states, work, lambda: None)
            during.append(time.perf_counter() - step_began)
        waiter.join()
        whole.append(time.perf_counter() - began)
        slow += [step_began / usual for step_began in during[:-1]]
        saved = way.load(str(number))
        assert saved.keys() == original.keys() and all(torch.equal(saved[key], original[key]) for key in original), name
        del saved, original
        shutil.rmtree(folder / str(number))
    first, later = held[0], statistics.median(held[1:])
    slower = f"{statistics.mean(slow):.2f}" if slow else ""
    alone, done = statistics.median(blocked[1:]), statistics.median(whole[1:])
    return f"| {name} | {first:.2f} | {later:.2f} | {alone:.2f} | {done:.2f} | {slower} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=1.2)
    parser.add_argument("--saves", type=int, default=4)
    parser.add_argument("--folder", type=Path, help="on the disk to measure")
    parser.add_argument("--only", nargs="+", choices=WAYS, default=list(WAYS))
    options = parser.parse_args()
    print(f"{options.gb} GB, {os.cpu_count()} cores, {torch.get_num_threads()} threads of torch {torch.__version__}")
    print(
        "| way | held up, first save (s) | later saves (s) | of it blocked (s) | save done after (s) | step meanwhile / alone |\n"
        "|---|---|---|---|---|---|"
    )
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for number, name in enumerate(options.only):
            print(measure(name, Path(folder) / str(number), options.gb, options.saves), flush=True)


if __name__ == "__main__":
    main()
    os._exit(0)  # DCP's process would wait for ever
