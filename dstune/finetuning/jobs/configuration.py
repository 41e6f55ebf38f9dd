"""Writes the configuration of a job's run as a file that Hydra composes.

No value passes through a command line. Values are numbers, generated ids, the operator's settings from models.yaml, and texts
without interpolations.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dstune.config.schema import TrainerConfig
from dstune.core import files
from dstune.finetuning.jobs.folder import JobFolder
from dstune.finetuning.jobs.hyperparameters import SAMPLES, Value
from dstune.finetuning.jobs.presets import LOCAL, TASK_OF, Preset
from dstune.protocols import LAUNCHERS

EXPERIMENT = "job"
HEAD = "# @package _global_\n"
PLAIN = re.compile(r"[\w .:@/+=-]{1,128}")
"""Text that is safe in a configuration: it cannot contain an interpolation."""
RESTARTS = 5
"""Restarts after a failed local rank; the same failure at the same step twice ends the job sooner."""
ANY_GRADER = {"type": "string_check", "name": "any", "operation": "eq", "input": "a", "reference": "a"}
"""A placeholder grader for plans, which are made before there is a request."""
VISIBLE_EPOCHS = 3
"""Checkpoints at epoch ends that a client can see."""


@dataclass(frozen=True)
class Plan:
    """The properties of a job that determine its configuration."""

    job: str
    method: str
    hyperparameters: Mapping[str, Value]
    """Numbers only."""
    seed: int
    validation: bool = False
    start: str | None = None
    """Folder of the adapter or model that training starts from."""
    wandb: Mapping[str, Any] | None = None
    grader: Mapping[str, Any] | None = None


def experiment(plan: Plan, preset: Preset, folder: JobFolder) -> dict[str, Any]:
    """Return the content of the job's experiment file."""
    hyperparameters = plan.hyperparameters
    task: dict[str, Any] = {}
    if plan.method == "dpo":
        task = {"loss": "dpo", "beta": float(hyperparameters["beta"])}
    evaluated: dict[str, Any] = {"every": "1 epoch" if plan.validation else 0, "at_start": False}
    if plan.method == "reinforcement":
        samples = max(2, round(SAMPLES * float(hyperparameters["compute_multiplier"])))
        task = {"graders": [str(folder.grader)], "samples": samples}
        if plan.validation:
            evaluated |= {
                "every": int(hyperparameters["eval_interval"]),
                "max_rows": int(hyperparameters["eval_samples"]),
            }
    adaptation = {key: value for key, value in preset.adaptation.items() if key != "name"}
    model = {"path": preset.path, "revision": preset.revision, "trust_remote_code": False}
    if plan.start is not None and (Path(plan.start) / "adapter_config.json").is_file():
        adaptation["adapter"] = plan.start
    elif plan.start is not None:
        model = {"path": plan.start, "revision": None, "trust_remote_code": False}
    rate = preset.base_rate(plan.method) * float(hyperparameters["learning_rate_multiplier"])
    job_settings: dict[str, Any] = {
        "model": model,
        "method": adaptation,
        "task": task,
        "data": {
            "train": str(folder.train),
            "validation": str(folder.validation) if plan.validation else None,
            "split": {"validation": 0.0, "test": 0.0, "seed": plan.seed},
            "packing": False,
            "max_length": preset.max_length,
            "clean": {"duplicates": "keep", "leaks": False, "unicode": False},
            "on_bad_row": "error",
        },
        "trainer": {
            "epochs": int(hyperparameters["n_epochs"]),
            "global_batch_size": int(hyperparameters["batch_size"]),
            "seed": plan.seed,
        },
        "optimizer": {"lr": float(f"{rate:.12g}")},
        "checkpoint": {"every": "1 epoch", "keep": VISIBLE_EPOCHS + 1},
        "evaluate": evaluated,
        "launch": _launch(preset),
        "tracking": _tracking(plan),
        "run": {"name": plan.job, "dir": str(folder.run), "export": "none", "mode": "private"},
    }
    groups = {"task": TASK_OF[plan.method], "method": str(preset.adaptation["name"]), "launch": preset.pool}
    defaults: list[Any] = [{f"override /{group}": choice} for group, choice in groups.items()]
    defaults += [{"override /data": "files"}, "_self_"]
    merged = _merged(job_settings, preset.settings)
    trainer = merged["trainer"]
    rows = trainer.get("micro_batch_size", TrainerConfig().micro_batch_size)
    if isinstance(rows, int):  # a micro-batch must not have more rows than the batch that the client chose
        trainer["micro_batch_size"] = min(rows, int(hyperparameters["batch_size"]))
    return {"defaults": defaults, **merged}


def _launch(preset: Preset) -> dict[str, Any]:
    settings = {key: value for key, value in preset.launch.items() if key != "name"}
    if preset.pool == LOCAL:
        return {"restarts": RESTARTS, **settings, "processes": preset.devices}
    # A job in a cluster's queue needs no process here. A launcher without this key never waits.
    launcher = LAUNCHERS[preset.pool]
    return settings | {"wait": False} if launcher.queue is not None and hasattr(launcher.Config, "wait") else settings


def _tracking(plan: Plan) -> dict[str, Any]:
    if plan.wandb is None:
        return {"wandb": {"mode": "disabled"}}
    tags = ["openai/finetune", plan.job, *(plan.wandb.get("tags") or [])]
    return {
        "project": plan.wandb["project"],
        "tags": tags,
        "wandb": {
            "mode": "online",
            "entity": plan.wandb.get("entity"),
            "name": plan.wandb.get("name") or plan.job,
            "id": plan.job,
        },
    }


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        value_before = merged.get(key)
        merged[key] = (
            _merged(value_before, value) if isinstance(value_before, Mapping) and isinstance(value, Mapping) else value
        )
    return merged


def write(plan: Plan, preset: Preset, folder: JobFolder) -> None:
    """Write the experiment to the job's folder, from which `arguments` reads it."""
    file = _file(folder)
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    if plan.method == "reinforcement":  # a separate file: a client's text must not become configuration
        files.write(folder.grader, json.dumps(plan.grader or ANY_GRADER), mode=0o600, sync=True)
    _write(file, experiment(plan, preset, folder))


def update_launch(folder: JobFolder, preset: Preset) -> None:
    """Update the launch settings of a job's next attempt from its preset; other settings stay."""
    file = _file(folder)
    content = json.loads(file.read_text().removeprefix(HEAD))
    _write(file, content | {"launch": _launch(preset)})


def _file(folder: JobFolder) -> Path:
    return folder.configuration / "experiment" / f"{EXPERIMENT}.yaml"


def _write(file: Path, content: Mapping[str, Any]) -> None:
    text = json.dumps(content, indent=1)
    assert "${" not in text, "texts with a reference are refused where they are read"
    files.write(file, f"{HEAD}{text}\n", mode=0o600, sync=True)


def arguments(folder: JobFolder) -> list[str]:
    """Return the command-line arguments that make dstune compose the job's configuration."""
    return ["--config-dir", str(folder.configuration), f"experiment={EXPERIMENT}"]
