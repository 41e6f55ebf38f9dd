#!/usr/bin/env python3
"""Seconds from a request to a fork's first output: dstune's fork server beside `multiprocessing.forkserver` with the same imports.

usage: python benchmarks/fork_servers.py
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # as a script it finds its own folder only

from dstune.core.child_python import child_environment
from dstune.launch.local import warm
from dstune.launch.local.fork_server import EVERY_RANK

STARTS = 4


def answer(connection: Connection) -> None:
    connection.send((os.environ.get("OF_THIS_START"), os.getcwd(), os.getsid(0) == os.getpid()))


def standard() -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*EVERY_RANK])
    for number in range(STARTS):
        os.environ["OF_THIS_START"] = str(number)
        os.chdir("/tmp" if number % 2 else "/")
        ours, theirs = context.Pipe()
        began = time.monotonic()
        process = context.Process(target=answer, args=(theirs,))
        process.start()
        variable, folder, has_session = ours.recv()
        seconds = time.monotonic() - began
        process.join()
        facts = f"variable {variable!r} of {number}, folder {folder}, a session of its own: {has_session}"
        print(f"multiprocessing.forkserver, start {number}: {seconds:.2f} s; {facts}", flush=True)


def of_dstune() -> None:
    with warm.offer() as variables, open(os.devnull, "wb") as log:
        server = warm.ForkServer(Path(variables[warm.FORK_SERVER]), (), print)
        for number in range(STARTS):
            began = time.monotonic()
            process = server.start([sys.executable, "-u", "-m", "this"], child_environment(), stdout=None, stderr=log)
            assert process is not None and process.stdout is not None
            with process.stdout:
                process.stdout.readline()
                print(f"dstune, start {number}: {time.monotonic() - began:.2f} s", flush=True)
                process.stdout.read()


if __name__ == "__main__":
    of_dstune()
    standard()
