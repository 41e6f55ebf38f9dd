"""Loads the predictor that a command line names by a run, one of its checkpoints, an export, an adapter or any model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dstune.checkpoint import store
from dstune.checkpoint.export import existing_or_new_export, find_checkpoint, model_of_export, refuse_damaged
from dstune.checkpoint.record import read_record, recorded_overrides
from dstune.config.compose import compose
from dstune.config.overrides import quoted
from dstune.config.registered import local_path
from dstune.config.run_file import read_run
from dstune.config.run_overrides import apply_overrides
from dstune.config.schema import ModelConfig, RunConfig
from dstune.config.trust import Use
from dstune.config.validate import validate
from dstune.core.errors import Problem, UserError, first_line
from dstune.core.model_names import refuse_ambiguous_folder
from dstune.core.tokenizers import open_tokenizer
from dstune.data.formats import check_columns
from dstune.inference.resolve_model import (
    adapter_settings,
    base_of,
    check_adapter,
    computing_dtype,
    with_local_files,
)
from dstune.launch import rundir
from dstune.parallel.none import NoParallelConfig
from dstune.protocols import METHODS, method_of, task_of

if TYPE_CHECKING:
    from dstune.inference.predictor import Predictor


@dataclass(frozen=True)
class ModelRequest:
    """The model to load, determined before any large file is read or written."""

    config: RunConfig
    labels: tuple[str, ...]
    """The labels in the model's order; empty if the task has none."""
    identity: list[Any]
    """An identity of the weights, as JSON, which changes with them."""
    run: Path | None = None
    step: str = ""
    """Of a run: a step, or `last` where the export is all that was kept."""
    adapter: Path | None = None
    """The folder of a peft adapter, whose base is the configuration's model."""


def find(model: ModelConfig, which: str, overrides: Sequence[str]) -> ModelRequest:
    """Return the model that `model.path` names. which: a step of a run, `best` or `last`.

    Raises UserError if the model is not available, or its task is to write text.
    """
    model = replace(model, path=local_path(model.path, "MODEL"))
    path = Path(model.path)
    if store.is_checkpoint(path):
        if which != "last":
            raise UserError(Problem("--checkpoint", "the model is a checkpoint already", "leave it out", which))
        path, which = store.run_and_step(path, "MODEL")
    if (path / "run.yaml").is_file():
        if model.revision is not None:
            raise UserError(Problem("--revision", "a run has none", "leave it out, or --checkpoint", model.revision))
        return _of_run(path, which, overrides)
    rundir.refuse_missing(path)
    if which != "last":
        raise UserError(Problem("--checkpoint", "only a run has checkpoints", "leave it out", which))
    refuse_ambiguous_folder(model.path, "MODEL", trusts_code=model.trust_remote_code)
    if (path / "adapter_config.json").is_file():
        return _of_adapter(path, model, overrides)
    return _of_model(model, overrides)


def _of_run(run: Path, which: str, overrides: Sequence[str]) -> ModelRequest:
    stored = read_run(run / "run.yaml", overrides, use=Use.weights).config
    config = _checked(apply_overrides(stored, list(overrides)), str(run))
    export = run / "export"
    if which == "last" and store.newest(run) is None and export.is_dir():  # all that was kept
        if (export / "adapter_config.json").is_file():
            return _of_adapter(export, config.model, overrides)
        labels = (read_record(export).get("task") or {}).get("labels") or []
        return ModelRequest(config, tuple(labels), _files_of(export), run=run, step=which)
    checkpoint = find_checkpoint(run, which)
    state = store.read_state(checkpoint)
    saved = (checkpoint / store.COMMITTED).stat().st_mtime_ns
    labels = state["labels"] if task_of(config.task).has_labels else []
    return ModelRequest(config, tuple(labels), [checkpoint.name, saved], run=run, step=str(state["step"]))


def _of_adapter(folder: Path, model: ModelConfig, overrides: Sequence[str]) -> ModelRequest:
    base = base_of(folder, model)
    if "task" not in read_record(folder) and not _names_task(overrides):
        reason = "is an adapter of which nothing tells its task"
        raise UserError(Problem("MODEL", reason, "task=NAME, and its labels: task.labels=[NAME,NAME]", str(folder)))
    texts = [f"model.path={quoted(base.path)}", *recorded_overrides(folder, list(overrides)), *overrides]
    config = _checked(compose(texts).config, str(folder))
    labels = list(task_of(config.task).given_labels)
    if task_of(config.task).has_labels and not labels:
        reason = "the adapter does not name its labels"
        raise UserError(Problem("task.labels", reason, "task.labels=[NAME,NAME] in their order"))
    adapter_model = replace(config.model, revision=base.revision, trust_remote_code=model.trust_remote_code)
    config = replace(config, model=with_local_files(adapter_model), method=METHODS.default())
    identity = [*_files_of(folder), config.model.revision, adapter_settings(folder)["base_model_name_or_path"]]
    return ModelRequest(config, tuple(labels), identity, adapter=folder)


def _of_model(model: ModelConfig, overrides: Sequence[str]) -> ModelRequest:
    from dstune.models.load import model_folder

    resolved_model = with_local_files(model)
    folder = model_folder(resolved_model)
    recorded = recorded_overrides(folder, list(overrides))
    if not recorded and not _names_task(overrides):
        reason = "nothing tells what it was trained for"
        fix = f"dstune predict {model.path} task=NAME; a language model answers `dstune generate`"
        raise UserError(Problem("MODEL", reason, fix, model.path))
    config = _checked(compose([f"model.path={quoted(model.path)}", *recorded, *overrides]).config, model.path)
    pinned = replace(config.model, revision=resolved_model.revision, trust_remote_code=resolved_model.trust_remote_code)
    return _with_own_labels(replace(config, model=pinned), [*_files_of(folder), resolved_model.revision])


def _with_own_labels(config: RunConfig, identity: list[Any]) -> ModelRequest:
    """Return a request for a complete model, whose configuration contains its labels."""
    from dstune.checkpoint.own_labels import with_labels
    from dstune.models.load import load_config

    config = with_labels(replace(config, method=METHODS.default()))
    if not task_of(config.task).has_labels:
        return ModelRequest(config, (), identity)
    name_by_index = load_config(config.model).id2label
    labels = task_of(config.task).given_labels or [name_by_index[index] for index in sorted(name_by_index)]
    return ModelRequest(config, tuple(labels), identity)


def _checked(config: RunConfig, path: str) -> RunConfig:
    """Return `config`, if its task has answers of this kind and its values can be. Raises UserError."""
    if task_of(config.task).generates:
        reason = f"is a model for task={config.task.name}, which writes text"
        raise UserError(Problem("MODEL", reason, f"dstune generate {path}", path))
    check_columns(config.data.columns)
    # Rows come from the command line; what else is checked needs some.
    data = replace(config.data, train=config.data.train or "rows", packing=False, streaming=False)
    validate(replace(config, data=data, parallel=NoParallelConfig()))
    return config


def _names_task(overrides: Sequence[str]) -> bool:
    return any(word.startswith("task=") for word in overrides)


def _files_of(folder: Path) -> list[Any]:
    """Return name, size and time of each weight file."""
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in sorted(folder.glob("*.safetensors"))]


def load(request: ModelRequest, scratch: Path) -> Predictor:
    """Load the predictor. scratch: an empty folder, where a run's adapter may be merged into its base.

    Raises UserError if files are damaged or weights are missing.
    """
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if request.adapter is not None:
        return _load_adapter(request, request.adapter)
    if request.run is None:
        return _load_whole(request)
    method = method_of(request.config.method)
    if method.adapter and not method.merges:
        return _load_beside(request, find_checkpoint(request.run, request.step))
    model = model_of_export(
        request.config.model, existing_or_new_export(request.run, scratch, which=request.step, merge=True)
    )
    return _load_whole(replace(request, config=replace(request.config, model=model, method=METHODS.default())))


def _load_whole(request: ModelRequest) -> Predictor:
    from dstune.models.load import new_weights

    body, tokenizer = _body(request)
    absent = new_weights(body).parameters
    if absent:
        reason = f"has no weights for {', '.join(absent[:3])}, so its answers would be chance"
        fix = f"train one: dstune train task={request.config.task.name}"
        raise UserError(Problem("MODEL", reason, fix, request.config.model.path))
    return _predictor(request, body, body, tokenizer)


def _load_beside(request: ModelRequest, checkpoint: Path) -> Predictor:
    """Load a model with a trained prompt in front of each row, which is built as in training."""
    from dstune.checkpoint.adapters import load_trained

    assert request.run is not None
    refuse_damaged(request.run, checkpoint)
    config = replace(request.config, model=with_local_files(request.config.model))
    body, tokenizer = _body(replace(request, config=config))
    module = method_of(config.method).apply(body, config)
    load_trained(module, checkpoint)
    return _predictor(request, module, body, tokenizer)


def _load_adapter(request: ModelRequest, folder: Path) -> Predictor:
    from safetensors import safe_open

    from dstune.models.load import new_weights
    from dstune.models.peft_load import load_peft_adapter

    file = folder / "adapter_model.safetensors"
    if not file.is_file():
        raise UserError(Problem("MODEL", "holds no adapter_model.safetensors", "save it with safetensors", str(folder)))
    body, tokenizer = _body(request)
    with safe_open(file, "pt") as tensors:
        tensor_names = set(tensors.keys())
    # In front of a name stands what peft wraps the model with, which differs between kinds of adapters.
    absent = [
        name
        for name in new_weights(body).parameters
        if not any(held_name.endswith(f".{name}") for held_name in tensor_names)
    ]
    if absent:
        reason = f"the adapter does not hold {', '.join(absent[:3])}, which its base lacks: its answers would be chance"
        raise UserError(Problem("MODEL", reason, "train it with its head", str(folder)))
    check_adapter(folder, body, "MODEL")
    try:
        module = load_peft_adapter(body, folder)
    except (RuntimeError, ValueError) as error:
        reason = f"does not fit its base: {first_line(error)}"
        raise UserError(Problem("MODEL", reason, "give the folder of another adapter", str(folder))) from error
    return _predictor(request, module, body, tokenizer)


def _body(request: ModelRequest) -> tuple[Any, Any]:
    """Return the transformers model and its tokenizer: the adapter's, if it has one."""
    from dstune.models.load import load_config, load_model, load_tokenizer, with_padding

    model, folder = request.config.model, request.adapter
    tokenizer = load_tokenizer(model)
    if folder is not None and (folder / "tokenizer_config.json").is_file():
        adapter_tokenizer = open_tokenizer(
            folder, where="adapter", trust_remote_code=model.trust_remote_code, local_files_only=True
        )
        tokenizer = with_padding(adapter_tokenizer)
    return load_model(request.config, tokenizer, request.labels, computing_dtype(load_config(model))), tokenizer


def _predictor(request: ModelRequest, module: Any, body: Any, tokenizer: Any) -> Predictor:
    """Build the predictor. module: `body`, or the module that wraps it."""

    from dstune.zero import accelerator

    module.to(accelerator.kind()).eval()
    task = task_of(request.config.task)
    return task.predictor()(request.config, module, task.head(body), tokenizer, request.labels)
