"""`launch.in_process=true`: the one rank of a run in the process that was started, where a debugger's breakpoints work."""

from __future__ import annotations

import os
import uuid
from pathlib import Path

from dstune.config.schema import RunConfig
from dstune.core.errors import EXIT_DONE
from dstune.core.rank_env import RankEnv
from dstune.launch import records
from dstune.launch.commands import local_plan


def run(config: RunConfig, run_dir: Path) -> int:
    """Train `config` in `run_dir`, which holds its `run.yaml`, and return the exit code.

    The rank has the environment that a process of its own would have; afterwards this process has its own again.
    """
    from dstune.rank.worker import main_inside

    (variables,) = local_plan(config, run_dir).env
    before = dict(os.environ)
    records.begin(run_dir, uuid.uuid4().hex, 1)
    os.environ.update(variables)
    try:
        code = main_inside(RankEnv(0, 1, 0, 1, "in-process"), lambda: (config, run_dir)).code
    finally:
        os.environ.clear()
        os.environ.update(before)
        _leave_process_group()
    if code != EXIT_DONE and records.read_result(run_dir) is None:
        records.write_result(run_dir, "failed", f"the rank ended with exit code {code}", 1)
    return code


def _leave_process_group() -> None:
    """So that another run may start in this process."""
    import torch.distributed

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
