"""Collated micro-batches of the coming windows, prepared in a thread while the model computes."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch

from dstune.config.schema import RunConfig
from dstune.data.build import PreparedData
from dstune.data.collate import collate
from dstune.data.sampler import MicroBatch, TrainingOrder, Window, share
from dstune.dist import World
from dstune.train.supply import Supply, order_of

T = TypeVar("T")


def training_order(config: RunConfig, data: PreparedData) -> TrainingOrder:
    """The global order of the training rows: the same on every rank and for any number of them."""
    return order_of(config, data.train)


@dataclass(frozen=True)
class Feed:
    """One window as this rank sees it."""

    window: Window
    epoch: float
    """Passes over the training rows that are done after it."""
    batches: tuple[tuple[MicroBatch, dict[str, torch.Tensor]], ...]


def windows(
    config: RunConfig, data: PreparedData, supply: Supply, world: World, pad_token_id: int, steps: range
) -> Iterator[Feed]:
    """The windows of `steps` in order, two windows ahead of their use."""

    def prepare(step: int) -> Feed:
        draw = supply.draw(step)
        pinned = torch.cuda.is_available()
        batches = []
        for micro_batch in share(draw.window.micro_batches, world.rank, world.size):
            batch = collate(
                draw.split,
                micro_batch,
                pad_token_id=pad_token_id,
                packing=config.data.packing,
                classification=bool(data.labels),
            )
            batch.pop("index", None)
            batches.append((micro_batch, {k: v.pin_memory() for k, v in batch.items()} if pinned else batch))
        return Feed(draw.window, draw.epoch, tuple(batches))

    feeds = ahead(prepare, steps, depth=2)
    try:
        for step, feed in zip(steps, feeds, strict=True):
            supply.begin(step)  # the ranks agree after every step, so all of them are done with the one before
            yield feed
    finally:
        supply.interrupt()
        feeds.close()


def ahead(prepare: Callable[[int], T], steps: range, depth: int) -> Generator[T]:
    """`prepare(step)` for each step, computed in one background thread; its exceptions are raised at their step."""
    ready: queue.Queue[T | BaseException] = queue.Queue(maxsize=depth)
    stopped = threading.Event()

    def put(item: T | BaseException) -> bool:
        while not stopped.is_set():
            try:
                ready.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        for step in steps:
            try:
                item: T | BaseException = prepare(step)
            except BaseException as error:
                item = error
            if not put(item) or isinstance(item, BaseException):
                return

    thread = threading.Thread(target=work, name="feed", daemon=True)
    thread.start()
    try:
        for _ in steps:
            item = ready.get()
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stopped.set()
        thread.join()
