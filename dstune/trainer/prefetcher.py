"""Prepares the micro-batches of the coming steps in a thread, while the model computes."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import torch

from dstune.config.schema import RunConfig, stage_of
from dstune.core.distributed import World
from dstune.core.errors import DstuneError, from_json, to_json
from dstune.data.batches import batch_of
from dstune.data.images.batch import with_images_everywhere
from dstune.data.sampler import MicroBatch, share
from dstune.models.heads import Head
from dstune.models.heads.base import indexed
from dstune.trainer.data_loader import DataLoader
from dstune.trainer.utilization import Counted, counted
from dstune.zero import accelerator

T = TypeVar("T")

WAIT_SECONDS = 0.5
"""While any rank waits for a block of a stream, all ranks agree this often on whether to go on waiting."""
AHEAD = 2
"""How many prepared steps wait in memory until they are used."""


@dataclass(frozen=True)
class RankBatch:
    """One step as this rank sees it."""

    weight: float
    """Targets of the global batch, on all ranks."""
    tokens: int
    """Tokens of the global batch, without padding."""
    epoch: float
    """Passes over the training rows up to the end of the step."""
    batches: tuple[tuple[MicroBatch, dict[str, torch.Tensor]], ...]
    """This rank's micro-batches and their tensors."""
    counted: Counted = field(default_factory=Counted)
    """Counts over `batches`, made in the thread that prepares them, so that no step waits for it."""


def prefetched_steps(
    config: RunConfig, data_loader: DataLoader, world: World, pad_token_id: int, steps: range, head: Head
) -> Iterator[RankBatch | None]:
    """Yield the steps of `steps` in order, prepared up to `AHEAD` steps ahead.

    While any rank waits for a block of a stream, yield None on all ranks, so that they can agree on what to do. If preparing the
    first step of a block fails on one rank, all ranks raise its error.
    """

    def prepare(step: int) -> RankBatch:
        loaded = data_loader.load(step)
        split, whole = loaded.split, loaded.global_batch
        pinned = accelerator.present()
        batches = []
        micro_batches = with_images_everywhere(
            whole.micro_batches, split, needed=needs_images(config, world), trained=config.model.train_vision
        )
        for micro_batch in share(micro_batches, world.data_parallel_rank, world.data_parallel_size):
            batch = indexed(head, batch_of(config, split, micro_batch, pad_token_id))
            batches.append((micro_batch, {k: v.pin_memory() for k, v in batch.items()} if pinned else batch))
        return RankBatch(whole.weight, whole.tokens, loaded.epoch, tuple(batches), counted(config, split, batches))

    prefetcher = Prefetcher(prepare, steps)
    try:
        for step in steps:
            while data_loader.may_wait(step) and not _all_ranks_are_ready(prefetcher, world):
                yield None
            batch = next(prefetcher)
            data_loader.begin(step)  # ranks synchronize after every step, so all of them are done with the previous one
            yield batch
    finally:
        data_loader.interrupt()
        prefetcher.close()


def needs_images(config: RunConfig, world: World) -> bool:
    """Return whether every micro-batch of a step with images must have one. A trained vision tower needs gradients on every rank,
    and all ranks must gather a partitioned one together."""
    return config.model.train_vision or (stage_of(config.zero) == 3 and world.size > 1)


def _all_ranks_are_ready(prefetcher: Prefetcher[RankBatch], world: World) -> bool:
    """Return whether every rank has prepared its next step. A collective that takes at most about `WAIT_SECONDS`."""
    item = prefetcher.peek(WAIT_SECONDS)
    if isinstance(item, BaseException) and not isinstance(item, DstuneError):
        raise item  # an unexpected error of this rank alone; when it ends, the launcher ends the others
    error = item if isinstance(item, DstuneError) else None
    waiting, failed = world.sum([item is None, error is not None])
    if failed:
        texts = world.gather(None if error is None else to_json(error))
        raise next(from_json(text) for text in texts if text is not None)
    return not waiting


def dropout_seed(seed: int, step: int, index: int, part: int = 0) -> int:
    """Return one of 2**63 seeds; distinct for all steps below 2**24 and micro-batches below 2**20 of one run seed.

    part: which part of the row's positions this rank has, if ranks share rows."""
    return (seed * 0x9E3779B97F4A7C15 + part * 0xD1B54A32D192ED03 + (step << 20) + index) % 2**63


class Prefetcher(Generic[T]):
    """Iterates over `prepare(step)` for each step, computed in a background thread. Its exceptions are raised at their step."""

    def __init__(self, prepare: Callable[[int], T], steps: range):
        self._prepare, self._steps = prepare, steps
        self._ready: queue.Queue[T | BaseException] = queue.Queue(maxsize=AHEAD)
        self._next: T | BaseException | None = None
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._work, name="feed", daemon=True)
        self._thread.start()

    def peek(self, seconds: float | None) -> T | BaseException | None:
        """Return the next item without consuming it; None if it is not ready within `seconds`."""
        if self._next is None:
            try:
                self._next = self._ready.get(timeout=seconds)
            except queue.Empty:
                return None
        return self._next

    def __next__(self) -> T:
        item, self._next = self.peek(None), None
        assert item is not None
        if isinstance(item, BaseException):
            raise item
        return item

    def close(self) -> None:
        self._stopped.set()
        self._thread.join()

    def _work(self) -> None:
        for step in self._steps:
            try:
                item: T | BaseException = self._prepare(step)
            except BaseException as error:
                item = error
            if not self._put(item) or isinstance(item, BaseException):
                return

    def _put(self, item: T | BaseException) -> bool:
        while not self._stopped.is_set():
            try:
                self._ready.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False
