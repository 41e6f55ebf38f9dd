"""`launch.in_process=true`: the one rank of a run in the process that was started, where a debugger's breakpoints work."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

from dstune.config.schema import RunConfig
from dstune.core.errors import EXIT_DONE, EXIT_FAILED, DstuneError, UserError
from dstune.core.rank_env import RankEnv
from dstune.launch import records
from dstune.launch.commands import local_plan
from dstune.launch.console import Console

RANK = RankEnv(0, 1, 0, 1, "in-process")


def run(config: RunConfig, run_dir: Path) -> int:
    """Train `config` in `run_dir`, which holds its `run.yaml`, and return the exit code.

    Raises:
        UserError: the run or one of its plugins is wrong, as with ranks in their own processes.
    """
    from dstune.rank.worker import main_inside

    with _as_rank(config, run_dir):
        outcome = main_inside(RANK, lambda: (config, run_dir, run_dir), prints=False)
    if outcome.code != EXIT_DONE and records.read_result(run_dir) is None:
        records.write_result(run_dir, "failed", f"the rank ended with exit code {outcome.code}", 1)
    if isinstance(outcome.error, UserError):
        raise outcome.error
    if outcome.error is not None:
        print(f"dstune: {outcome.error}", file=sys.stderr, flush=True)
    return outcome.code


def call(config: RunConfig, directory: Path, command: Sequence[str], console: Console) -> int:
    """Run a module other than training in the rank (see `dstune/rank/process.py`), and return the exit code.

    Its output goes to the console, as that of ranks does.

    Raises:
        DstuneError: the rank raised it.
    """
    module, _, *arguments = command
    with _as_rank(config, directory), redirect_stdout(console.out):
        try:
            importlib.import_module(module).run(directory, RANK, *arguments)
        except DstuneError:
            raise
        except Exception:  # any other exception ends a rank in its own process with a traceback and this code
            traceback.print_exc()
            return EXIT_FAILED
    return EXIT_DONE


@contextmanager
def _as_rank(config: RunConfig, run_dir: Path) -> Iterator[None]:
    """Give this process the environment of a rank within the block, and restore its own environment afterwards."""
    (variables,) = local_plan(config, run_dir).env
    environment_before = dict(os.environ)
    records.begin(run_dir, uuid.uuid4().hex, 1)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(environment_before)
        from dstune.zero.start import leave_process_group

        leave_process_group()
