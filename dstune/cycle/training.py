"""The run of a cycle: from the current version, on new rows and a share of old ones."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path

from dstune.checkpoint import store
from dstune.config.overrides import quoted
from dstune.config.run_file import Composed, read_run, write_run
from dstune.config.run_overrides import apply_overrides
from dstune.config.schema import RunConfig
from dstune.core import files
from dstune.core.child_python import child_environment
from dstune.core.errors import EXIT_DONE, EXIT_PREEMPTED, Preempted, TrainingFailed
from dstune.cycle.settings import CycleSettings
from dstune.launch import records
from dstune.protocols import method_of, task_of
from dstune.protocols.method import MethodConfig
from dstune.protocols.method_options import StartsFromAdapters
from dstune.protocols.task_options import TakesLabels


def config_from_version(base: RunConfig, folder: Path) -> RunConfig:
    """Return the first run's configuration, started from a version's export.

    The export contains everything that the first run gave its model: weights, settings of `config.json`, longer positions,
    adapters.
    """
    from dstune.checkpoint.export import model_of_export

    return replace(base, model=model_of_export(base.model, folder), method=_without_adapters(base.method))


def _without_adapters(config: MethodConfig) -> MethodConfig:
    """Return `config` with the keys that name adapter folders reset to their defaults."""
    method = method_of(config)
    if not isinstance(method, StartsFromAdapters) or not method.folders:
        return config
    default, folders = type(config)(), method.folders
    values = {field.name: getattr(config, field.name) for field in fields(config)}
    lists = {key: value if isinstance(value, list) else [value] for key, value in values.items()}
    keys_with_adapters = [key for key, items in lists.items() if any(item in folders for item in items)]
    return replace(config, **{key: getattr(default, key) for key in keys_with_adapters})


def training_overrides(settings: CycleSettings, rows: Path, old: Path, validation: Path | None, name: str) -> list[str]:
    """Return the overrides that change the first run's settings, apart from its model. validation: None if it held out no rows."""
    forgetting = {"replay": settings.replay, "l2sp": settings.l2sp, "ewc": settings.ewc}
    needs_old = settings.replay > 0 or settings.ewc > 0
    return [
        f"data.train={quoted(str(rows))}",
        *(
            ["data.validation=null", "data.split.validation=0"]
            if validation is None
            else [f"data.validation={quoted(str(validation))}"]
        ),
        "data.test=null",
        "data.format=auto",
        "data.columns={}",
        "data.max_rows=null",
        *(f"forgetting.{key}={value}" for key, value in forgetting.items()),
        f"forgetting.general={quoted(str(old)) if needs_old else 'null'}",
        f"run.name={name}",
        *settings.overrides,
    ]


def prepare_run(
    run: Path, base: RunConfig, overrides: Sequence[str], labels: Sequence[str], plugins: Sequence[object]
) -> None:
    """Write the run's configuration unless it exists. Raises UserError."""
    if (run / "run.yaml").is_file():
        return
    config = apply_overrides(base, list(overrides))
    if labels and isinstance(task := task_of(config.task), TakesLabels):
        config = replace(config, task=task.with_labels(labels))  # new rows may lack some
    run.mkdir(parents=True, exist_ok=True)
    write_run(run / "run.yaml", Composed(config, list(overrides), tuple(plugins)))  # type: ignore[arg-type]


def train(run: Path) -> None:
    """Start the run, or continue it. Raises Preempted, TrainingFailed."""
    _wait_for_orphan(run)
    result = records.read_result(run)
    if result is not None and result.get("status") == "completed":
        return
    # In a separate process: ranks of a notebook, or of a test, would inherit state of an earlier training.
    code = subprocess.run([sys.executable, "-m", "dstune", "train", str(run)], env=child_environment()).returncode
    if code == EXIT_PREEMPTED:
        raise Preempted(f"the training in {run} was stopped: repeat the command to go on")
    if code != EXIT_DONE:
        raise TrainingFailed(f"the training in {run} ended with exit code {code}: see its logs")


def _wait_for_orphan(run: Path) -> None:
    """Wait until no other process trains in the folder: the training of a killed cycle continues without it."""
    descriptor = files.open_plain(run / records.LOCK, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    finally:
        os.close(descriptor)


def labels_of_run(run: Path) -> tuple[str, ...]:
    """Return the labels of a run's newest checkpoint, or the configured ones without a checkpoint; empty if its task has none."""
    config = read_run(run / "run.yaml").config
    if not task_of(config.task).has_labels:
        return ()
    newest = store.newest(run)
    labels = store.read_state(newest)["labels"] if newest is not None else task_of(config.task).given_labels
    return tuple(labels)


def export_model(run: Path, target: Path, *, with_reference: bool = True) -> str:
    """Export the merged model of a run's newest checkpoint unless `target` exists. Returns the digest of its weights.

    with_reference: whether to add rows with which a server compares its traffic, taken from the rows that the run held out. Do not
    set it without held-out rows: training rows would be taken, and they may have to be deleted some day.
    """
    from dstune.checkpoint.export import export_checkpoint, find_checkpoint
    from dstune.inference.reference import add_reference

    if not target.is_dir():
        export_checkpoint(run, find_checkpoint(run, "last"), target, merge=True)
    if with_reference:
        add_reference(target, run)
    return weights_digest(target)


def weights_digest(folder: Path) -> str:
    import hashlib

    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        digest.update(json.dumps([file.name, file.stat().st_size]).encode())
        with file.open("rb") as stream:
            while block := stream.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()[:24]
