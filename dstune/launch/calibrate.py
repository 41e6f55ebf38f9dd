"""`dstune plan --calibrate`: measure this machine with real ranks, and remember it for the plans to come."""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path

from dstune.config.compose import Composed, write_run
from dstune.config.launch_schema import LocalConfig
from dstune.config.schema import RunConfig
from dstune.errors import EXIT_DONE, TrainingFailed
from dstune.launch import supervise
from dstune.launch.commands import local_plan
from dstune.launch.console import Console
from dstune.planning import calibration


def calibrate(config: RunConfig, console: Console) -> None:
    """Measure with as many ranks as `config` would start here; takes about half a minute.

    Raises:
        UserError: more processes than GPUs. TrainingFailed: a rank failed.
    """
    with tempfile.TemporaryDirectory(prefix="dstune-") as scratch:
        directory = Path(scratch)
        if not isinstance(config.launch, LocalConfig):  # measured here
            config = replace(config, launch=LocalConfig())
        write_run(directory / "run.yaml", Composed(config, []))
        plan = local_plan(config, directory, console=console.kind)
        console.stage(f"measuring with {plan.size} rank{'s' * (plan.size > 1)}")
        ranks = tuple(
            (*argv[: argv.index("dstune.worker")], "dstune.calibrate_ranks", str(directory)) for argv in plan.argv
        )
        code = supervise.run(config, directory, plan=replace(plan, argv=ranks), console=console, saves=False)
        if code != EXIT_DONE:
            raise TrainingFailed("the measurement did not finish; its logs are above")
        found = json.loads((directory / "speeds.json").read_text())
    calibration.remember(found)
