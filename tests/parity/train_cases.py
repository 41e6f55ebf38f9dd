"""Program of the parity tests, on every rank: trains a list of cases one after another in one process group."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from pathlib import Path

from dstune import worker
from dstune.config.compose import read_run, write_run
from dstune.errors import Preempted
from dstune.rank_env import from_environment
from dstune.zero.engine import start_process_group


def main() -> None:
    env = from_environment(os.environ)
    assert env is not None
    world = start_process_group(env)
    for case in json.loads(sys.argv[1]):
        run_dir = Path(case["run_dir"])
        composed = read_run(Path(case["run_yaml"]))
        if world.is_main:
            run_dir.mkdir(parents=True, exist_ok=True)
            write_run(run_dir / "run.yaml", composed)
        world.barrier()
        with contextlib.suppress(Preempted):
            worker.train(composed.config, run_dir, world)


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)
