"""Real ranks for tests: a small program on N processes over gloo, with one start-up for many cases."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dstune.core.rendezvous import free_port
from support import warm_start

if TYPE_CHECKING:
    from dstune.core.distributed import World

ROOT = Path(__file__).parents[2]


def environment(rank: int, size: int, port: int, per_node: int) -> dict[str, str]:
    return {
        **os.environ,
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": str(rank % per_node),
        "LOCAL_WORLD_SIZE": str(min(per_node, size - rank // per_node * per_node)),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
    }


def start_rank() -> World:
    """Join the process group that `run_ranks` has described; for its programs."""
    from dstune.core.rank_env import from_environment
    from dstune.zero.start import start_process_group

    env = from_environment(os.environ)
    assert env is not None
    return start_process_group(env)


def end_with(main: Callable[[], None]) -> None:
    """Run the `main` of such a program and leave; DeepSpeed's threads need not be waited for."""
    main()
    sys.stdout.flush()
    os._exit(0)


def run_ranks(
    program: Path, size: int, argument: Any, *, per_node: int | None = None, timeout: float = 600
) -> list[str]:
    """Run `python program JSON` on `size` ranks; their outputs in rank order. Fails with the output of a failing rank.

    per_node: ranks that take themselves for those of one node; all by default.

    Ranks write to files: one that fills a pipe which nobody reads yet would wait for ever, and the others for it. Where a
    rank fails, the others, which wait for it too, are given a few seconds.
    """
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder) / f"rank-{rank}.log" for rank in range(size)]
        processes = []
        for rank, log in enumerate(logs):
            with log.open("w") as stream:
                command = [sys.executable, str(program), json.dumps(argument)]
                process = warm_start.Popen(
                    command,
                    env=environment(rank, size, port, per_node or size),
                    stdout=stream,
                    stderr=subprocess.STDOUT,
                )
                processes.append(process)
        deadline = time.monotonic() + timeout
        try:
            while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
                if any(process.returncode for process in processes):
                    deadline = min(deadline, time.monotonic() + 5)
                time.sleep(0.05)
        finally:
            codes = [process.poll() for process in processes]
            for process in processes:
                if process.poll() is None:
                    process.kill()
                    process.wait()
        outputs = [log.read_text(errors="replace") for log in logs]
    # The rank that failed by itself before those that were ended because of it, or because the time was over.
    for rank, code in sorted(enumerate(codes), key=lambda entry: entry[1] is None):
        how = f"did not end within {timeout:g} s" if code is None else f"exited with {code}"
        assert code == 0, f"rank {rank} of {size} {how}:\n{outputs[rank][-6000:]}"
    return outputs
