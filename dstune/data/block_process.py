"""The process that prepares blocks of a stream: `python -m dstune.data.block_process`, started by `blocks.Blocks`.

On its standard input come one pickled `Job` and then (name, begin) of the blocks to prepare, one after the other. It
ends when that input does, in the middle of a block if need be: the rank that started it has gone.
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
"""Meant for the ranks, which save first and close the input after; some launchers send them to every process."""


def main() -> None:
    redact_output()
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    # The processes that tokenize are ended by SIGTERM, so they must not ignore it.
    os.register_at_fork(after_in_child=lambda: [signal.signal(number, signal.SIG_DFL) for number in STOP_SIGNALS])
    os.nice(NICENESS)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    plugins.load_installed()  # before what they define is unpickled
    job: Job = pickle.load(sys.stdin.buffer)
    name_panics()
    held_out = np.load(job.held_out)
    requests: queue.Queue[tuple[str, dict[str, Any]]] = queue.Queue()
    threading.Thread(target=_listen, args=(requests,), daemon=True).start()
    while True:
        name, begin = requests.get()
        try:
            cache.entry(job.root, name, partial(_make, job, held_out, Position(**begin)))
        except UserError:  # kept beside the block, for the ranks to raise when they come to it
            continue


def _make(job: Job, held_out: np.ndarray, begin: Position, folder: Path) -> None:
    """Make a block. The files of the stream are looked for here, so that an error in that is one of the block."""
    block_builder(job.config, job.tokenizer, begin, held_out, job.shards, job.arguments)(folder)


def _listen(requests: queue.Queue[tuple[str, dict[str, Any]]]) -> None:
    while True:
        try:
            requests.put(pickle.load(sys.stdin.buffer))
        except (EOFError, pickle.UnpicklingError):
            for child in psutil.Process().children(recursive=True):
                child.kill()
            os._exit(0)


if __name__ == "__main__":
    main()
