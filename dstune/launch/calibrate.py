"""`dstune plan --calibrate`: measure this machine with real ranks, and remember it for the plans to come."""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from dstune.config.compose import Composed, write_run
from dstune.config.launch_schema import LocalConfig
from dstune.config.schema import RunConfig
from dstune.errors import EXIT_DONE, TrainingFailed
from dstune.launch import supervise
from dstune.launch.commands import local_plan
from dstune.launch.console import Console
from dstune.paths import cache_root
from dstune.planning.time import Speed

FILE = "calibration.json"
"""In the cache: what was measured, by the number of ranks."""


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
    everything = _read()
    everything[str(found["ranks"])] = found
    cache_root().mkdir(parents=True, exist_ok=True)
    aside = cache_root() / f"{FILE}.incomplete"
    aside.write_text(json.dumps(everything, indent=1))
    aside.replace(cache_root() / FILE)


def speeds(ranks: int, *, on_gpu: bool) -> dict[int, Speed]:
    """What was measured here with as many ranks, by the bytes of a weight; empty where nothing was."""
    found = _read().get(str(ranks))
    if not found or (found["device"] == "CPU") == on_gpu:
        return {}
    return {int(size): Speed(**numbers) for size, numbers in found["speeds"].items()}


def _read() -> dict[str, Any]:
    try:
        value = json.loads((cache_root() / FILE).read_text())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
