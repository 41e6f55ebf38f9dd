"""Writes and reads the record of a run in its export (`dstune.json`), by which the model is evaluated as it was trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dstune import __version__
from dstune.checkpoint.contents import KEY, describe_contents
from dstune.config.convert import EnvironmentText, build, may_refer, to_dict
from dstune.config.data_schema import AUTOMATIC
from dstune.config.overrides import key_of, quoted
from dstune.config.plugins import activate_requested
from dstune.config.run_file import read_run_content
from dstune.config.schema import RunConfig
from dstune.config.trust import SIGNATURE
from dstune.core.errors import Problem, UserError
from dstune.core.parsing import object_in
from dstune.protocols import ROW_FORMATS, TASKS, Task, method_of, task_of
from dstune.protocols.method_options import QuantizesWeights
from dstune.protocols.task import TaskConfig
from dstune.protocols.task_options import ExportsFiles

if TYPE_CHECKING:
    from transformers import PretrainedConfig

NAME = "dstune.json"
RECORDED = ("format", "max_length", "packing")
"""Keys of `data` that are recorded."""


def write_record(
    folder: Path,
    config: RunConfig,
    state: dict[str, Any],
    checkpoint: str,
    run_dir: Path,
    architecture: PretrainedConfig | None = None,
) -> None:
    """Write `dstune.json`: task, data settings, base model by the name that the run gave it, step; and where that name refers
    to the environment, the signature of the run, so that it may do so."""
    task = to_dict(config)["task"]
    for key in task_of(config.task).unrecorded:
        del task[key]
    if "labels" in task:
        task["labels"] = state["labels"]
    data = config.data
    shape = (
        {"shape": ROW_FORMATS[data.format].shape}
        if data.format in ROW_FORMATS and ROW_FORMATS[data.format].shape
        else {}
    )
    method = method_of(config.method)
    record = {
        "dstune": __version__,
        "task": task,
        "data": {name: getattr(data, name) for name in RECORDED} | shape,
        "base_model": public_name(config.model.path),
        "revision": config.model.revision,
        "method": config.method.name,
        **(method.record() if isinstance(method, QuantizesWeights) else {}),
        **({} if architecture is None or not task_of(config.task).has_head else _head(architecture)),
        "step": state["step"],
        "checkpoint": checkpoint,
        **({KEY: describe_contents(folder)} if (folder / "config.json").is_file() else {}),
    }
    if isinstance(config.model.path, EnvironmentText):
        record[SIGNATURE] = read_run_content(run_dir / "run.yaml").get(SIGNATURE)
    (folder / NAME).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def _head(architecture: PretrainedConfig) -> dict[str, Any]:
    """Return the values that rebuild the head of an adapter's base model without the task's code (`lakehouse.registered_model`)."""
    return {"outputs": architecture.num_labels, "problem_type": architecture.problem_type}


def read_record(folder: Path) -> dict[str, Any]:
    """Return the record in `folder`, without malformed `task` or `data`; empty if there is no readable record."""
    record = object_in(folder / NAME)
    task, data = record.get("task"), record.get("data")
    if not isinstance(task, dict) or not isinstance(task.get("name"), str):
        record.pop("task", None)
    if not isinstance(data, dict) or not isinstance(data.get("format"), str):
        record.pop("data", None)
    return record


def recorded_task(folder: Path, kind: type[Task]) -> TaskConfig:
    """Return the configuration of the task `kind` in the record in `folder`. Raises UserError if a key or value is invalid for that
    task, or refers to the environment of this machine."""
    task = read_record(folder)["task"]
    _refuse_references(folder, {f"task.{key}": value for key, value in task.items()}, [])
    config: TaskConfig = build(kind.Config, task, f"{folder / NAME}: task")
    return config


def recorded_overrides(folder: Path, command_overrides: list[str]) -> list[str]:
    """Return the export's task and data settings as overrides; without the task's if `command_overrides` chooses another task.

    Without a record, the task follows from the head in `config.json`, or from sentence-transformers files.
    Activates the plugins of the project and of `command_overrides`, since the task may come from one of them.
    """
    activate_requested(command_overrides)
    chosen = next((text.partition("=")[2] for text in command_overrides if text.startswith("task=")), None)
    record = read_record(folder)
    if "task" not in record:
        if chosen is None and (task_name := task_of_head(folder)):
            return [f"task={task_name}"]
        for name in TASKS if chosen is None else [chosen]:
            if name not in TASKS:
                continue
            kind = TASKS[name]
            if issubclass(kind, ExportsFiles) and (overrides := kind.overrides_from(folder)):
                return overrides if chosen is None else overrides[1:]
        return []
    task = dict(record["task"])
    data = {name: value for name, value in record.get("data", {}).items() if name in RECORDED}
    shape = record.get("data", {}).get("shape")
    if data and data["format"] not in ROW_FORMATS and isinstance(shape, str) and shape in ROW_FORMATS:
        data["format"] = shape  # the plugin that has the format is not here, and not needed for rows of its shape
    recorded = {f"task.{key}": value for key, value in task.items()} | {f"data.{key}": data[key] for key in data}
    _refuse_references(folder, recorded, command_overrides)
    name = task.pop("name")
    if chosen is None and name not in TASKS:  # a path would be a configuration that somebody put beside the export
        fix = f"one of {', '.join(TASKS)}; or load the plugin that has it: plugins=[FILE.py]"
        raise UserError(Problem(f"{folder / NAME}: task.name", "there is no such task", fix, name))
    overrides = [] if chosen else [f"task={name}"]
    if chosen in (None, name):
        overrides += [f"task.{key}={_value(value)}" for key, value in task.items()]
    if data.get("format") == AUTOMATIC:
        del data["format"]
    return overrides + [f"data.{key}={_value(value)}" for key, value in data.items()]


def _refuse_references(folder: Path, recorded: dict[str, Any], overrides: list[str]) -> None:
    """Raise UserError if composing the overrides would resolve a reference in the record, which anybody may have written."""
    words = {key_of(text) for text in overrides}
    for key, value in recorded.items():
        if "$" in key or (may_refer(json.dumps(value)) and key not in words):
            reason = "refers to something outside the export, which anybody may have written"
            raise UserError(Problem(f"{folder / NAME}: {key}", reason, f"give it yourself: {key}=VALUE", str(value)))


def public_name(path: str) -> str:
    """Return a hub id or sample unchanged, and only the name of a local folder: its path is private."""
    if isinstance(path, EnvironmentText):
        return path.reference
    if path.startswith("sample://"):
        return path
    return Path(path).name if Path(path).exists() or path.startswith(("/", ".", "~")) else path


def task_of_head(folder: Path) -> str | None:
    """Return the task that the head named in the folder's config.json is for; None where it has none, or there is no such file."""
    architectures = object_in(folder / "config.json").get("architectures")
    if not isinstance(architectures, list):
        return None
    ends = {name: task.head_classes for name, task in TASKS.classes().items() if task.head_classes}
    return next((task for task, end in ends.items() if any(str(name).endswith(end) for name in architectures)), None)


def _value(value: Any) -> str:
    """Return `value` in the grammar of overrides."""
    if isinstance(value, list):
        return f"[{','.join(map(_value, value))}]"
    if isinstance(value, dict):
        return f"{{{','.join(f'{key}: {_value(item)}' for key, item in value.items())}}}"
    if isinstance(value, str):
        return quoted(value)
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
