"""Write files that let a scheduler run cycles: a crontab, a SLURM script, or a job of a Databricks asset bundle."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import yaml

from dstune.core import files
from dstune.core.errors import Problem, UserError
from dstune.cycle.settings import CycleSettings

SCRIPT = "dstune_cycle.py"
SCRIPT_TEXT = """import sys

from dstune.cli import main

# A task that ends by SystemExit counts as failed, even with 0.
if code := main(["cycle", *sys.argv[1:]]):
    sys.exit(code)
"""
NAMES = {"cron": "cycle.cron", "slurm": "cycle.sbatch", "databricks": "databricks.yml"}


def write_schedule(config: Path, settings: CycleSettings, kind: str, output: Path | None) -> Path:
    """Write the file with which a scheduler runs `dstune cycle CONFIG` once a day, and return it. Raises UserError."""
    path = config.absolute()
    for place in (str(path), str(settings.folder), str(Path.cwd())):
        if not place.isprintable() or "%" in place:  # cron ends a command at a percent sign
            raise UserError(
                Problem("CONFIG", "its path has a character that schedulers change", "another folder", place)
            )
    words = [sys.executable, "-m", "dstune", "cycle", str(path)]
    content = {"cron": _cron, "slurm": _slurm, "databricks": _databricks}[kind](words, settings)
    target = output or settings.folder / NAMES[kind]
    if target.exists():
        raise UserError(Problem("--output", "exists already", "give another file, or remove it", str(target)))
    target.parent.mkdir(parents=True, exist_ok=True)
    files.write(target, content)
    if kind == "databricks":
        files.write(target.with_name(SCRIPT), SCRIPT_TEXT)
    return target


def _here() -> str:
    """Return a command that enters the current folder, because runs may name their data relative to it."""
    return f"cd {shlex.quote(str(Path.cwd()))}"


def _cron(words: list[str], settings: CycleSettings) -> str:
    log = shlex.quote(str(settings.folder / "cycle.log"))
    return f"# crontab FILE\n17 3 * * * {_here()} && {shlex.join(words)} >> {log} 2>&1\n"


def _slurm(words: list[str], settings: CycleSettings) -> str:
    """Return a job script that queues its successor first, so that a failing job does not end the chain."""
    script = shlex.quote(str(settings.folder / NAMES["slurm"]))
    lines = [
        "#!/usr/bin/env bash",
        "#SBATCH --job-name=dstune-cycle",
        "#SBATCH --time=12:00:00",
        "#SBATCH --dependency=singleton",
        f"#SBATCH --output={settings.folder / 'cycle-%j.log'}",
        f"{_here()} || exit",
        f"sbatch --begin=now+1day {script}",
        f"exec {shlex.join(words)}",
    ]
    return "\n".join(lines) + "\n"


def _databricks(words: list[str], settings: CycleSettings) -> str:
    """Return an asset bundle for `databricks bundle validate` and `databricks bundle deploy`. The user chooses the cluster."""
    job = {
        "name": "dstune-cycle",
        "max_concurrent_runs": 1,
        "schedule": {"quartz_cron_expression": "0 17 3 * * ?", "timezone_id": "UTC"},
        "tasks": [
            {
                "task_key": "cycle",
                "spark_python_task": {"python_file": f"./{SCRIPT}", "parameters": words[-1:]},
                "existing_cluster_id": "${var.cluster_id}",
                "max_retries": 2,
            }
        ],
    }
    bundle = {
        "bundle": {"name": "dstune-cycle"},
        "variables": {"cluster_id": {"description": "a cluster with dstune, and a GPU where the training needs one"}},
        "resources": {"jobs": {"dstune_cycle": job}},
        "targets": {"prod": {"mode": "production"}},
    }
    head = "# The parameter is where the cluster finds the file of the cycle, and its paths are those of the cluster.\n"
    return head + yaml.safe_dump(bundle, sort_keys=False)
