"""The configuration of a job's run, as data: a file that Hydra composes. Nothing of it goes through a command line.

Values are numbers, ids that are made here, what the operator wrote into models.yaml, and texts that hold no reference.
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
"""Text that may stand in a configuration: no reference begins in it."""
RESTARTS = 5
"""Of local ranks that fail; the same failure at the same step twice ends the job sooner."""
ANY_GRADER = {"type": "string_check", "name": "any", "operation": "eq", "input": "a", "reference": "a"}
"""In the place of a grader where there is no request yet: for a plan."""
KEPT_EPOCHS = 3
"""Checkpoints of epochs that a client sees."""


@dataclass(frozen=True)
class Plan:
    """What of a job its configuration depends on."""

    job: str
    method: str
    hyperparameters: Mapping[str, Value]
    """Numbers alone."""
    seed: int
    validation: bool = False
    start: str | None = None
    """Folder of the adapter, or model, that training goes on from."""
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
        "checkpoint": {"every": "1 epoch", "keep": KEPT_EPOCHS + 1},
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
    if isinstance(rows, int):  # a micro-batch has no more rows than the batch that the client chose
        trainer["micro_batch_size"] = min(rows, int(hyperparameters["batch_size"]))
    return {"defaults": defaults, **merged}


def _launch(preset: Preset) -> dict[str, Any]:
    settings = {key: value for key, value in preset.launch.items() if key != "name"}
    if preset.pool == LOCAL:
        return {"restarts": RESTARTS, **settings, "processes": preset.devices}
    # A job of a queue needs no process here. A launcher without the key never waits.
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
    made = dict(below)
    for key, value in above.items():
        value_before = made.get(key)
        made[key] = (
            _merged(value_before, value) if isinstance(value_before, Mapping) and isinstance(value, Mapping) else value
        )
    return made


def write(plan: Plan, preset: Preset, folder: JobFolder) -> None:
    """Write the experiment into the job's folder, where `arguments` finds it."""
    file = _file(folder)
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    if plan.method == "reinforcement":  # a file of its own: what a client wrote is no configuration
        files.write(folder.grader, json.dumps(plan.grader or ANY_GRADER), mode=0o600, sync=True)
    _write(file, experiment(plan, preset, folder))


def launch_anew(folder: JobFolder, preset: Preset) -> None:
    """Have the next attempt of a job run where the preset says now; the rest stays as it was."""
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
    """Return what follows a verb of dstune to compose the job's configuration."""
    return ["--config-dir", str(folder.configuration), f"experiment={EXPERIMENT}"]
