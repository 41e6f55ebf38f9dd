"""The process that prepares blocks of a stream: `python -m dstune.data.block_process`, started by `blocks.Blocks`.

It reads from standard input one pickled `Job`, then (name, begin) of each block to prepare. It exits when the input ends, even
in the middle of a block: the rank that started it is gone.
"""

from __future__ import annotations

import logging
import os
import pickle
import queue
import signal
import sys
import threading
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from dstune.config.schema import PREEMPTION_SIGNALS
from dstune.core import plugins
from dstune.core.errors import UserError
from dstune.core.secrets import redact_output
from dstune.core.tokenizers import name_panics
from dstune.data import cache
from dstune.data.blocks import NICENESS, Job
from dstune.data.builder import block_builder
from dstune.data.stream import Position

STOP_SIGNALS = tuple(signal.Signals[name] for name in PREEMPTION_SIGNALS)
"""Signals that this process ignores. They are meant for the ranks, which save and then close the input; some launchers send
them to every process."""


def main() -> None:
    redact_output()
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    # Forked processes that tokenize are stopped by SIGTERM, so they must not ignore it.
    os.register_at_fork(after_in_child=lambda: [signal.signal(number, signal.SIG_DFL) for number in STOP_SIGNALS])
    os.nice(NICENESS)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    plugins.load_installed()  # the job may contain objects of plugins
    job: Job = pickle.load(sys.stdin.buffer)
    name_panics()
    held_out = np.load(job.held_out)
    requests: queue.Queue[tuple[str, dict[str, Any]]] = queue.Queue()
    threading.Thread(target=_read_requests, args=(requests,), daemon=True).start()
    while True:
        name, begin = requests.get()
        try:
            cache.entry(job.root, name, partial(_make, job, held_out, Position(**begin)))
        except UserError:  # written next to the block by `cache.entry`; the ranks raise it when they reach the block
            continue


def _make(job: Job, held_out: np.ndarray, begin: Position, folder: Path) -> None:
    """Write a block to `folder`. The files of the stream are looked up here, so that an error in that is reported for the block."""
    block_builder(job.config, job.tokenizer, begin, held_out, job.shards, job.arguments)(folder)


def _read_requests(requests: queue.Queue[tuple[str, dict[str, Any]]]) -> None:
    """Put the requests from standard input into the queue; end this process and its children when the input ends."""
    while True:
        try:
            requests.put(pickle.load(sys.stdin.buffer))
        except (EOFError, pickle.UnpicklingError):
            for child in psutil.Process().children(recursive=True):
                child.kill()
            os._exit(0)


if __name__ == "__main__":
    main()
