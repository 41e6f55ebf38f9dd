"""`dstune plan --calibrate`: measures this machine with real ranks, and stores the speeds for later plans."""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import replace
from pathlib import Path

from dstune.config.run_file import Composed, write_run
from dstune.config.schema import RunConfig
from dstune.core import plugins
from dstune.core.errors import EXIT_DONE, TrainingFailed
from dstune.launch.commands import number_of_ranks, on_this_machine, this_machine
from dstune.launch.console import Console
from dstune.planning import calibration
from dstune.protocols import launcher_of
from dstune.protocols.launcher import LaunchRequest


def calibrate(config: RunConfig, console: Console) -> None:
    """Measure with as many ranks as `config` would start here; takes about half a minute.

    Raises:
        UserError: more processes than GPUs. TrainingFailed: a rank failed.
    """
    with tempfile.TemporaryDirectory(prefix="dstune-") as scratch:
        directory = Path(scratch)
        config = replace(config, launch=on_this_machine(config.launch))
        write_run(directory / "run.yaml", Composed(config, [], plugins.used_by(config)))
        ranks = number_of_ranks(config, this_machine(os.environ))
        console.stage(f"measuring with {ranks} rank{'s' * (ranks > 1)}")
        command = ("dstune.rank.calibrate", str(directory))
        request = LaunchRequest(config, directory, console, command=command, saves=False)
        code = launcher_of(config.launch).start(request)
        if code != EXIT_DONE:
            raise TrainingFailed("the measurement did not finish; its logs are above")
        speeds = json.loads((directory / "speeds.json").read_text())
    calibration.remember(speeds)
