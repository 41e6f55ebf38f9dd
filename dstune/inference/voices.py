"""Loads a language model, with any number of named adapters, from a run, a checkpoint, an export or any model."""

from __future__ import annotations

import sys
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dstune.checkpoint import store
from dstune.checkpoint.record import read_record, recorded_task, task_of_head
from dstune.config.architectures import mark_encoder_decoder, mark_vision
from dstune.config.registered import local_path
from dstune.config.schema import ModelConfig
from dstune.core.errors import Problem, UserError, files_of_others, first_line
from dstune.core.stored_implementations import without_stored_implementations
from dstune.core.tokenizers import open_tokenizer
from dstune.inference.resolve_model import (
    adapted_modules,
    adapter_settings,
    base_of,
    check_adapter,
    computing_dtype,
    local_pretrained_options,
)
from dstune.protocols import METHODS, TASKS, task_of
from dstune.protocols.method_options import QuantizesWeights
from dstune.protocols.task import TaskConfig

OWN = "default"
"""Name of the adapter in the model's own folder, if that folder holds one."""
BASE = "base"
"""Name of the model without any adapter."""


@dataclass(frozen=True)
class Voice:
    """How prompts are written for one adapter, or for the model without any."""

    tokenizer: Any
    chat: bool
    """Whether prompts go through the chat template."""
    date: str | None = None
    """The date that the template writes, as in training."""
    task: TaskConfig | None = None
    """Set if a prompt is a source text, for which the model writes the target as in training, and not a conversation."""


@dataclass(frozen=True)
class Speaker:
    """A model with its voices by adapter name; the first one answers unless a request names another."""

    model: Any
    voices: Mapping[str, Voice]


@dataclass(frozen=True)
class _Located:
    """Where the weights are, and how their run wrote prompts."""

    config: ModelConfig
    chat: bool = True
    date: str | None = None
    task: TaskConfig | None = None

    @property
    def adapter_folder(self) -> Path | None:
        folder = Path(self.config.path)
        return folder if (folder / "adapter_config.json").is_file() else None


@contextmanager
def open_speaker(requested: ModelConfig, checkpoint: str, adapters: Mapping[str, str]) -> Iterator[Speaker]:
    """Load the model `requested.path`: a run, a checkpoint, an export, a folder, a hub id or a sample.

    checkpoint: which checkpoint of a run: a step, `best` or `last`. adapters: paths of further adapters (runs or exports) by name.

    Raises UserError if one of them cannot be loaded, or writes no text.
    """
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    logging.get_logger("bitsandbytes").setLevel(logging.ERROR)  # imported by peft; warns of libraries that nobody needs
    print(f"loading {requested.path}", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(prefix="dstune-") as scratch:
        requested_model = _locate(requested, checkpoint, Path(scratch) / OWN, "MODEL")
        others = {
            name: _locate(ModelConfig(path=path), "last", Path(scratch) / name, f"--adapter {name}")
            for name, path in adapters.items()
        }
        no_adapters = [name for name, other in others.items() if other.adapter_folder is None]
        if no_adapters:
            fix = "give the directory of a LoRA run, or its export"
            raise UserError(Problem(f"--adapter {name}", "is no adapter", fix, adapters[name]) for name in no_adapters)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # transformers warns of calls that peft makes
            speaker = _load(requested_model, others)
        from dstune.zero import accelerator

        speaker.model.to(accelerator.kind()).eval()
        yield speaker


def _locate(requested: ModelConfig, checkpoint_name: str, scratch: Path, key: str) -> _Located:
    """Find the weights of `requested.path`. A run's checkpoint without an export is exported into `scratch`."""
    from dstune.checkpoint.export import existing_or_new_export
    from dstune.config.run_file import read_run
    from dstune.config.trust import Use
    from dstune.launch import rundir

    requested = replace(requested, path=local_path(requested.path, key))
    path = Path(requested.path)
    if store.is_checkpoint(path):
        if checkpoint_name != "last":
            raise UserError(
                Problem("--checkpoint", "the model is a checkpoint already", "leave it out", checkpoint_name)
            )
        path, checkpoint_name = store.run_and_step(path, key)
    if not (path / "run.yaml").is_file():
        rundir.refuse_missing(path)
        if checkpoint_name != "last":
            raise UserError(Problem("--checkpoint", "only a run has checkpoints", "leave it out", checkpoint_name))
        return _locate_by_record(requested, key)
    config = read_run(path / "run.yaml", use=Use.weights).config
    _refuse_model_without_text(config.task.name, key, str(path))
    folder = existing_or_new_export(path, scratch, which=checkpoint_name)
    trust = requested.trust_remote_code or config.model.trust_remote_code
    model = replace(requested, path=str(folder.absolute()), trust_remote_code=trust)
    task = task_of(config.task)
    if task.asks_by_prompt:
        return _Located(model, chat=False, task=config.task)
    return _Located(model, chat=task.conversational, date=task.template_date)


def _locate_by_record(requested: ModelConfig, key: str) -> _Located:
    """Locate a model that is no run, with the task that its export recorded, if any."""
    task = read_record(Path(requested.path)).get("task") or {}
    _refuse_model_without_text(task.get("name") or task_of_head(Path(requested.path)), key, requested.path)
    kind = TASKS.classes().get(task.get("name", ""))
    if kind is not None and kind.asks_by_prompt:
        return _Located(requested, chat=False, task=recorded_task(Path(requested.path), kind))
    return _Located(requested, chat=kind is None or kind.conversational, date=task.get("template_date"))


def _refuse_model_without_text(task: str | None, key: str, path: str) -> None:
    """Raise UserError if models of this task write no text."""
    kind = TASKS.classes().get(task or "")
    if kind is not None and not kind.generates:
        reason = f"is a model for task={task}, no language model, so it writes no text"
        input_flag = "--text TEXT" if kind.predicts_from_text else "--input FILE"
        raise UserError(Problem(key, reason, f"dstune predict {path} {input_flag}", path))


def _load(main_model: _Located, others: Mapping[str, _Located]) -> Speaker:
    from dstune.models.load import vision_files
    from dstune.models.peft_load import load_peft_adapter

    main_adapter = main_model.adapter_folder
    base = main_model.config if main_adapter is None else base_of(main_adapter, main_model.config)
    source = local_pretrained_options(base)
    architecture = _architecture(source, base)
    voices: dict[str, Voice] = {}
    folders = {
        **({OWN: main_adapter} if main_adapter else {}),
        **{name: other.adapter_folder for name, other in others.items()},
    }
    for name, folder in folders.items():
        assert folder is not None
        has_tokenizer = (folder / "tokenizer_config.json").is_file()
        tokenizer_folder = {"pretrained_model_name_or_path": folder} if has_tokenizer else {}
        adapter = main_model if name == OWN and main_adapter else others[name]
        tokenizer = open_tokenizer(where=_flag_of(name), **(source | tokenizer_folder))
        voices[name] = _voice(tokenizer, adapter, architecture.is_encoder_decoder)
        _note_other_base(name, folder, base)
    base_tokenizer = open_tokenizer(where="model.path", **source)
    voices[BASE] = _voice(base_tokenizer, main_model, architecture.is_encoder_decoder)

    if vision := vision_files(base, architecture):
        for voice in voices.values():
            mark_vision(voice.tokenizer, vision)
    adapted = {name for folder in folders.values() if folder for name in adapted_modules(folder)}
    model = _language_model(source, architecture, base, read_record(main_adapter) if main_adapter else {}, adapted)
    largest_vocabulary = max(len(voice.tokenizer) for voice in voices.values())
    if largest_vocabulary > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(largest_vocabulary, mean_resizing=False)
    for name, folder in folders.items():
        assert folder is not None
        check_adapter(folder, model, _flag_of(name))
        try:
            model = load_peft_adapter(model, folder, name)
        except (RuntimeError, ValueError) as error:
            reason = f"does not fit the model: {first_line(error)}"
            raise UserError(Problem(_flag_of(name), reason, "give an adapter of this model", str(folder))) from error
    return Speaker(model, voices)


def _flag_of(name: str) -> str:
    """Return the words of the command line that gave this adapter, for error messages."""
    return "MODEL" if name == OWN else f"--adapter {name}"


def voice_of(folder: Path, tokenizer: Any) -> Voice:
    """Return the voice of the exported adapter in `folder` for a model that is in memory.

    tokenizer: the model's, used if the adapter has none. Raises UserError if the adapter writes no text.
    """
    if (folder / "tokenizer_config.json").is_file():
        tokenizer = open_tokenizer(folder, where="adapter", local_files_only=True)
    return _voice(tokenizer, _locate_by_record(ModelConfig(path=str(folder)), str(folder)), is_encoder_decoder=False)


def _voice(tokenizer: Any, located: _Located, is_encoder_decoder: bool) -> Voice:
    task = located.task
    if is_encoder_decoder:
        mark_encoder_decoder(tokenizer)
        # One that dstune did not train has no recorded task: it reads prompts as they are.
        task = task or next(kind.Config() for kind in TASKS.classes().values() if kind.encoder_decoder)
    chat = located.chat and not is_encoder_decoder and bool(tokenizer.chat_template)
    return Voice(tokenizer, chat, located.date, task)


def _note_other_base(name: str, folder: Path, base: ModelConfig) -> None:
    """Print a note if the adapter was trained on another base: where the shapes happen to fit, it writes nonsense. No error, since
    one base may have several names."""
    from dstune.checkpoint.model_folder import base_name

    trained_base = adapter_settings(folder)["base_model_name_or_path"]
    if trained_base != base_name(base):
        print(f"dstune: adapter {name} was trained on {trained_base}, and is put on {base.path}", file=sys.stderr)


def _architecture(source: dict[str, Any], requested: ModelConfig) -> Any:
    from transformers import AutoConfig

    with files_of_others("MODEL", requested.path, "its config.json", "give a hub id or a folder with a config.json"):
        return without_stored_implementations(AutoConfig.from_pretrained(**source))


def _language_model(
    source: dict[str, Any],
    architecture: Any,
    requested: ModelConfig,
    record: Mapping[str, Any],
    adapted: Iterable[str] = (),
) -> Any:
    """Load the language model.

    record: what the export of the model's own adapter recorded: an adapter that was trained on 4-bit weights gets such weights,
    if bitsandbytes is installed. adapted: names of the modules that adapters change.
    """
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    from dstune.models.quantize import keep_layout
    from dstune.models.unreached import class_of_adapters

    kind = AutoModelForSeq2SeqLM if architecture.is_encoder_decoder else AutoModelForCausalLM
    kind = class_of_adapters(kind, architecture, adapted)
    dtype = computing_dtype(architecture)
    method = METHODS.classes().get(str(record.get("method")))
    options = {}
    if method is not None and issubclass(method, QuantizesWeights):
        options = method.serving_options(record, dtype)
    with files_of_others(
        "MODEL", requested.path, "its model", "give a folder with config.json and safetensors weights"
    ):
        model, loading = kind.from_pretrained(
            **source, **options, config=architecture, dtype=dtype, use_safetensors=True, output_loading_info=True
        )
    absent = sorted(loading["missing_keys"])
    if absent:
        reason = f"is no language model: it has no weights for {', '.join(absent[:2])}"
        raise UserError(Problem("MODEL", reason, "give a model that writes text", requested.path))
    keep_layout(model)
    return model
