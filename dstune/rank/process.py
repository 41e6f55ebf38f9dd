"""Start and end of a rank's process. Each module that ranks run for something else than training has `run(directory, env, ...)`.

`python -m MODULE DIRECTORY ...` starts such a rank: `directory` has the `run.yaml`, and gets the `result.json`.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from dstune.core import handoff
from dstune.core.disk import is_disk_full
from dstune.core.errors import EXIT_FAILED, DstuneError, TrainingFailed, first_line
from dstune.core.rank_env import RankEnv, die_with_parent, from_environment
from dstune.core.rank_errors import report_to_launcher


def main(run: Callable[..., None]) -> None:
    """Call `run` in a rank that dstune started, and end the process."""
    die_with_parent()
    env = from_environment(os.environ) or RankEnv(0, 1, 0, 1, "alone")
    directory, arguments = Path(sys.argv[1]), sys.argv[2:]
    handoff.set_up_rank(env.rank, directory, os.environ)
    exit_now(
        guarded(lambda: run(directory, env, *arguments), lambda error: report_to_launcher(directory, env.rank, error))
    )


def guarded(work: Callable[[], None], report: Callable[[DstuneError], None]) -> int:
    """Run `work` and return the exit code; an error that a user can cause goes to `report`."""
    try:
        work()
        return 0
    except DstuneError as error:
        report(error)
        return error.exit_code
    except BaseException as error:
        if is_disk_full(error):
            report(TrainingFailed(f"a full disk refused a write: {first_line(error)}"))
        with suppress(OSError):  # a full disk takes no traceback
            traceback.print_exc()
        return EXIT_FAILED


def exit_now(code: int) -> None:
    """End this process now: after an error, threads of a collective that waits for dead ranks would keep it alive."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):  # such as a log on a full disk
            stream.flush()
    os._exit(code)
