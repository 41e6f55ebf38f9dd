"""From what a command line names to a predictor: a run, one of its checkpoints, an export, an adapter or any model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from dstune.checkpoint import store
from dstune.checkpoint.export import exported, find_checkpoint, refuse_damaged
from dstune.checkpoint.record import read_record, recorded_overrides
from dstune.config.compose import apply_overrides, compose, read_run
from dstune.config.method_rules import can_merge
from dstune.config.method_schema import AdapterConfig, FullConfig
from dstune.config.overrides import quoted
from dstune.config.schema import InitialWeights, ModelConfig, RunConfig
from dstune.config.task_schema import HEADED, WRITERS, EmbeddingConfig
from dstune.data.rows import has_labels
from dstune.errors import Problem, UserError
from dstune.located import base_of, computing_dtype, is_checkpoint, resolved, run_and_step

if TYPE_CHECKING:
    import torch

    from dstune.predict.predictor import Predictor


@dataclass(frozen=True)
class Wanted:
    """What to load."""

    config: RunConfig
    """Its model is a whole one, or the base of an adapter; its method that of `checkpoint`, else full."""
    labels: tuple[str, ...]
    """In the model's order; empty where the task has none."""
    checkpoint: Path | None = None
    """Of a run, with an adapter that cannot become part of its base."""
    adapter: Path | None = None
    """The folder of an adapter of peft."""


def find(model: ModelConfig, which: str, overrides: Sequence[str], scratch: Path) -> Wanted:
    """What `model.path` means. which: a step of a run, `best` or `last`; scratch: where an export may be made.

    Raises UserError where it cannot be had, or its task is to write text.
    """
    path = Path(model.path)
    if is_checkpoint(path):
        path, which = run_and_step(path, "MODEL")
    if (path / "run.yaml").is_file():
        return _of_run(path, which, overrides, scratch)
    if which != "last":
        raise UserError(Problem("--checkpoint", "only a run has checkpoints", "leave --checkpoint out", which))
    if (path / "adapter_config.json").is_file():
        return _of_adapter(path, model, overrides)
    return _of_model(model, overrides)


def _of_run(run: Path, which: str, overrides: Sequence[str], scratch: Path) -> Wanted:
    config = apply_overrides(read_run(run / "run.yaml").config, list(overrides))
    _refuse_writers(config, str(run))
    if isinstance(config.method, AdapterConfig) and not can_merge(config.method):
        checkpoint = find_checkpoint(run, which)
        refuse_damaged(run, checkpoint)
        config = replace(config, model=resolved(config.model))
        return Wanted(config, tuple(store.read_state(checkpoint)["labels"]), checkpoint=checkpoint)
    folder = exported(run, scratch, which=which, merge=True)
    # Its configuration, tokenizer and chat template are those that the run trained with.
    model = replace(
        config.model,
        path=str(folder),
        revision=None,
        weights=InitialWeights.pretrained,
        chat_template=None,
        config_overrides={},
    )
    return _whole(replace(config, model=model))


def _of_adapter(folder: Path, model: ModelConfig, overrides: Sequence[str]) -> Wanted:
    record = read_record(folder)
    base = base_of(folder, model)
    given = [f"model.path={quoted(base.path)}", *recorded_overrides(folder, list(overrides)), *overrides]
    config = compose(given).config
    if not record and not any(word.startswith("task=") for word in overrides):
        reason = "is an adapter of which nothing tells its task"
        raise UserError(Problem("MODEL", reason, "task=NAME, and its labels: task.labels=[NAME,NAME]", str(folder)))
    _refuse_writers(config, str(folder))
    named = getattr(config.task, "labels", [])
    if has_labels(config.task) and not named:
        reason = "the adapter does not name its labels"
        raise UserError(Problem("task.labels", reason, "task.labels=[NAME,NAME] in their order"))
    own = replace(config.model, revision=base.revision, trust_remote_code=model.trust_remote_code)
    config = replace(config, model=resolved(own), method=FullConfig())
    return Wanted(config, tuple(named), adapter=folder)


def _of_model(model: ModelConfig, overrides: Sequence[str]) -> Wanted:
    from dstune.models.load import model_folder

    found = resolved(model)
    recorded = recorded_overrides(model_folder(found), list(overrides))
    config = compose([f"model.path={quoted(model.path)}", *recorded, *overrides]).config
    if not recorded and not any(word.startswith("task=") for word in overrides):
        reason = "nothing tells what it was trained for"
        fix = f"dstune predict {model.path} task=NAME; a language model answers `dstune generate`"
        raise UserError(Problem("MODEL", reason, fix, model.path))
    _refuse_writers(config, model.path)
    return _whole(replace(config, model=replace(found, attention=config.model.attention)))


def _whole(config: RunConfig) -> Wanted:
    """A model that has its labels in its own configuration."""
    from dstune.checkpoint.own_labels import with_labels
    from dstune.models.load import load_config

    config = with_labels(replace(config, method=FullConfig()))
    if not has_labels(config.task):
        return Wanted(config, ())
    own = load_config(config.model).id2label
    return Wanted(config, tuple(own[index] for index in sorted(own)))


def _refuse_writers(config: RunConfig, path: str) -> None:
    if isinstance(config.task, WRITERS):
        reason = f"is a model for task={config.task.name}, which writes text"
        raise UserError(Problem("MODEL", reason, f"dstune generate {path}", path))
    assert isinstance(config.task, (*HEADED, EmbeddingConfig))


def load(wanted: Wanted) -> Predictor:
    """Raises UserError where files are damaged, or weights are missing."""
    from transformers import AutoTokenizer
    from transformers.utils import logging

    from dstune.checkpoint.adapters import load_trained
    from dstune.models.load import load_config, load_model, load_tokenizer, new_weights
    from dstune.models.peft import apply_method
    from dstune.predict.predictor import predictor

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    config = wanted.config
    tokenizer = load_tokenizer(config.model)
    if wanted.adapter and (wanted.adapter / "tokenizer_config.json").is_file():
        tokenizer = AutoTokenizer.from_pretrained(wanted.adapter)
    body = load_model(config, tokenizer, wanted.labels, computing_dtype(load_config(config.model)))
    if wanted.checkpoint is not None:
        module: torch.nn.Module = apply_method(config, body)
        load_trained(module, wanted.checkpoint)
        return predictor(config, module, body, tokenizer, wanted.labels)
    if wanted.adapter is not None:
        return predictor(config, _adapted(body, wanted.adapter), body, tokenizer, wanted.labels)
    absent = new_weights(body).parameters
    if absent:
        reason = f"has no weights for {', '.join(absent[:3])}, so its answers would be chance"
        raise UserError(Problem("MODEL", reason, f"train one: dstune train task={config.task.name}", config.model.path))
    return predictor(config, body, body, tokenizer, wanted.labels)


def _adapted(body: torch.nn.Module, folder: Path) -> torch.nn.Module:
    import peft
    from safetensors import safe_open

    from dstune.models.load import new_weights

    file = folder / "adapter_model.safetensors"
    if not file.is_file():
        raise UserError(Problem("MODEL", "holds no adapter_model.safetensors", "save it with safetensors", str(folder)))
    with safe_open(file, "pt") as tensors:
        held = set(tensors.keys())
    # In front of a name stands what peft wraps the model with, which differs between kinds of adapters.
    absent = [name for name in new_weights(body).parameters if not any(own.endswith(f".{name}") for own in held)]
    if absent:
        reason = f"the adapter does not hold {', '.join(absent[:3])}, which its base lacks: its answers would be chance"
        raise UserError(Problem("MODEL", reason, "train it with its head", str(folder)))
    try:
        return peft.PeftModel.from_pretrained(body, folder)
    except (RuntimeError, ValueError) as error:
        reason = f"does not fit its base: {str(error).splitlines()[0]}"
        raise UserError(Problem("MODEL", reason, value=str(folder))) from error
