"""Blocks of a stream on one node: a separate process prepares the next block while the ranks train on the current one.

One rank of a node, the leader, owns that process and decides what it prepares; the other ranks only wait for folders to
appear. A block's folder is named after its number and the position where it begins, so a stale folder is never used for it.
"""

from __future__ import annotations

import json
import logging
import pickle
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from dstune.config.schema import RunConfig
from dstune.core.child_python import child_environment
from dstune.core.errors import TrainingFailed
from dstune.data import cache
from dstune.data.prepared import PreparedData, Split, load_split

POLL_SECONDS = 0.02

NICENESS = 10
"""Niceness of the preparing process: on a CPU it shares cores with the training, which has priority."""

CLOSE_SECONDS = 10.0
"""Time for the preparing process to exit by itself; it takes milliseconds."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Block:
    """A prepared block of the stream."""

    number: int
    split: Split
    begin: dict[str, Any] | None
    """The position (`stream.Position`) of its first row; None for the first block."""
    end: dict[str, Any]
    """The position after its last row."""
    passes: tuple[float, float]
    """Number of passes over the stream before and after it."""
    digest: str
    """Digest of its samples' lengths and numbers of targets."""


@dataclass(frozen=True)
class Job:
    """What the preparing process needs to know."""

    config: RunConfig
    tokenizer: Any
    held_out: Path
    shards: list[list[str]]
    """The shards of the first block; later blocks must find the same ones."""
    arguments: Mapping[str, Any]
    """The chat-template arguments that all rows of the first block share."""
    root: Path
    """The folder of the blocks."""


class Blocks:
    """The blocks of one run on this node.

    data: the first block, as returned by `build.prepare`. run_dir: names the folder of the blocks in `cache_root`, together with
    the host, so that neither two runs nor two nodes that share the cache remove each other's blocks. arguments: the chat-template
    arguments that all rows of the first block share (`Proof.arguments`). leader: whether this rank owns the preparing process.
    """

    def __init__(
        self,
        config: RunConfig,
        tokenizer: Any,
        data: PreparedData,
        run_dir: Path,
        cache_root: Path,
        *,
        arguments: Mapping[str, Any],
        leader: bool,
    ):
        assert data.stream is not None
        run_digest = xxhash.xxh3_64_hexdigest(str(run_dir.resolve()).encode())
        self.root = cache_root / "stream" / f"{run_digest}-{socket.gethostname()}"
        self._first = data
        self._leader = leader
        self._started = time.time()
        self._process: subprocess.Popen[bytes] | None = None
        if leader:
            stream = data.stream
            self._process = _start(Job(config, tokenizer, stream.held_out, stream.shards, arguments, self.root))
        self._requested: set[str] = set()
        self._lock = threading.Lock()
        self._interrupted = threading.Event()

    def get(self, number: int, begin: dict[str, Any] | None) -> Block:
        """Return block `number`, which begins at `begin`; wait until it is prepared.

        Raises UserError for its bad rows, TrainingFailed if the preparing process died, InterruptedError after `interrupt`.
        """
        if number == 0:
            stream = self._first.stream
            assert stream is not None
            return _block(0, self._first.train, None, stream.end, (0.0, stream.passes))
        assert begin is not None
        folder = self.root / self._name(number, begin)
        if self._leader:
            self._request(number, begin)
        waited = 0.0
        while not cache.is_made(self.root, folder.name, self._started):
            if self._process is not None and self._process.poll() is not None:
                reason = f"the process that prepares the rows ended with {self._process.returncode}"
                raise TrainingFailed(f"{reason}; its last lines are in this rank's log")
            if self._interrupted.wait(POLL_SECONDS):
                raise InterruptedError(f"nobody waits for block {number} any more")
            waited += POLL_SECONDS
            if waited >= cache.POLL_SECONDS:
                log.warning("waiting for block %d of the stream: rows are prepared slower than they train", number)
                waited = 0.0
        meta = json.loads((folder / "meta.json").read_text())
        stream = meta["stream"]
        return _block(number, load_split(folder, "train"), begin, stream["end"], (stream["begun"], stream["passes"]))

    def keep_from(self, first: int, block: Block, *, ahead: bool) -> None:
        """Remove the blocks before number `first`, which no rank needs any more. With `ahead`, prepare the block after `block`."""
        if not self._leader:
            return
        kept_names = [] if block.begin is None else [self._name(block.number, block.begin)]
        kept_names.append(self._name(block.number + 1, block.end))
        with self._lock:
            kept_names += [name for name in self._requested if _number(name) >= first]
            self._requested &= set(kept_names)
            for path in self.root.glob("block-*"):
                if path.name.split(".")[0] not in kept_names:
                    _remove(path)
        if ahead:
            self._request(block.number + 1, block.end)

    def interrupt(self) -> None:
        """Make a waiting `get` raise InterruptedError."""
        self._interrupted.set()

    def close(self, *, remove: bool) -> None:
        """End the preparing process. With `remove`, delete the blocks; otherwise a resumed run uses them."""
        if self._process is not None:
            assert self._process.stdin is not None
            self._process.stdin.close()  # it exits at the end of its input
            try:
                self._process.wait(CLOSE_SECONDS)
            except subprocess.TimeoutExpired:  # suspended, or in a read that hangs
                self._process.kill()
                self._process.wait()
            self._process = None
        if remove and self._leader:
            shutil.rmtree(self.root, ignore_errors=True)

    def _request(self, number: int, begin: dict[str, Any]) -> None:
        """Ask the preparing process for a block, unless that was done before or the block exists."""
        with self._lock:
            name = self._name(number, begin)
            if name in self._requested:
                return
            self._requested.add(name)
            if (self.root / name).is_dir():
                return
            assert self._process is not None, "only the leader requests blocks, and not after `close`"
            assert self._process.stdin is not None
            try:
                pickle.dump((name, begin), self._process.stdin)
                self._process.stdin.flush()
            except BrokenPipeError:
                log.debug("the preparing process is gone; `get` raises that")

    def _name(self, number: int, begin: dict[str, Any]) -> str:
        identity = json.dumps([self._first.fingerprint, begin], sort_keys=True)
        return f"block-{number:06d}-{xxhash.xxh3_64_hexdigest(identity.encode())}"


def _number(name: str) -> int:
    return int(name.split("-")[1])


def _block(
    number: int, split: Split, begin: dict[str, Any] | None, end: dict[str, Any], passes: tuple[float, float]
) -> Block:
    digest = xxhash.xxh3_64()
    digest.update(split.lengths.tobytes())
    digest.update(split.weights.tobytes())
    return Block(number, split, begin, end, passes, digest.hexdigest())


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _start(job: Job) -> subprocess.Popen[bytes]:
    """Start the preparing process in the session of this rank, so that whoever ends the rank ends the process too."""
    # It computes nothing on the GPU, where a CUDA context would only take memory.
    environment = child_environment() | {"CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen(
        [sys.executable, "-m", "dstune.data.block_process"], stdin=subprocess.PIPE, env=environment
    )
    assert process.stdin is not None
    pickle.dump(job, process.stdin)
    process.stdin.flush()
    return process
