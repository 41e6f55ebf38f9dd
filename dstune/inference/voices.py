"""A language model in memory, with its adapters by name, from a run, a checkpoint, an export or any model."""

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
"""Name of the adapter that the model's own folder is."""
BASE = "base"
"""Name under which the model without any adapter answers."""


@dataclass(frozen=True)
class Voice:
    """How one adapter (or the model without any) is spoken to."""

    tokenizer: Any
    chat: bool
    """Whether prompts go through the chat template."""
    date: str | None = None
    """The date that the template tells, as in training."""
    task: TaskConfig | None = None
    """A prompt is a source, which is asked for its target as in training; it writes no conversations."""


@dataclass(frozen=True)
class Speaker:
    """A model with its voices; the first one answers unless another is asked for."""

    model: Any
    voices: Mapping[str, Voice]


@dataclass(frozen=True)
class _Found:
    """Where weights are, and how their run spoke to them."""

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
    """Load the model `requested.path` (a run, a checkpoint of one, an export, a folder, a hub id or a sample) into memory.

    checkpoint: which one of a run: a step, `best` or `last`. adapters: further ones by name, each a run or an export.

    Raises UserError where they cannot be had, or write no text.
    """
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    logging.get_logger("bitsandbytes").setLevel(logging.ERROR)  # peft imports it; it misses what nobody needs
    print(f"loading {requested.path}", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(prefix="dstune-") as scratch:
        requested_model = _find(requested, checkpoint, Path(scratch) / OWN, "MODEL")
        others = {
            name: _find(ModelConfig(path=path), "last", Path(scratch) / name, f"--adapter {name}")
            for name, path in adapters.items()
        }
        no_adapters = [name for name, other in others.items() if other.adapter_folder is None]
        if no_adapters:
            fix = "give the directory of a LoRA run, or its export"
            raise UserError(Problem(f"--adapter {name}", "is no adapter", fix, adapters[name]) for name in no_adapters)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of transformers, about what peft asks of it
            speaker = _load(requested_model, others)
        from dstune.zero import accelerator

        speaker.model.to(accelerator.kind()).eval()
        yield speaker


def _find(requested: ModelConfig, which: str, scratch: Path, key: str) -> _Found:
    from dstune.checkpoint.export import existing_or_new_export
    from dstune.config.run_file import read_run
    from dstune.config.trust import Use
    from dstune.launch import rundir

    requested = replace(requested, path=local_path(requested.path, key))
    path = Path(requested.path)
    if store.is_checkpoint(path):
        if which != "last":
            raise UserError(Problem("--checkpoint", "the model is a checkpoint already", "leave it out", which))
        path, which = store.run_and_step(path, key)
    if not (path / "run.yaml").is_file():
        rundir.refuse_missing(path)
        if which != "last":
            raise UserError(Problem("--checkpoint", "only a run has checkpoints", "leave it out", which))
        return _from_record(requested, key)
    config = read_run(path / "run.yaml", use=Use.weights).config
    _refuse_no_writer(config.task.name, key, str(path))
    folder = existing_or_new_export(path, scratch, which=which)
    trust = requested.trust_remote_code or config.model.trust_remote_code
    model = replace(requested, path=str(folder.absolute()), trust_remote_code=trust)
    task = task_of(config.task)
    if task.asks_by_prompt:
        return _Found(model, chat=False, task=config.task)
    return _Found(model, chat=task.conversational, date=task.template_date)


def _from_record(requested: ModelConfig, key: str) -> _Found:
    task = read_record(Path(requested.path)).get("task") or {}
    _refuse_no_writer(task.get("name") or task_of_head(Path(requested.path)), key, requested.path)
    kind = TASKS.classes().get(task.get("name", ""))
    if kind is not None and kind.asks_by_prompt:
        return _Found(requested, chat=False, task=recorded_task(Path(requested.path), kind))
    return _Found(requested, chat=kind is None or kind.conversational, date=task.get("template_date"))


def _refuse_no_writer(task: str | None, key: str, path: str) -> None:
    kind = TASKS.classes().get(task or "")
    if kind is not None and not kind.generates:
        reason = f"is a model for task={task}, no language model, so it writes no text"
        input_flag = "--text TEXT" if kind.predicts_from_text else "--input FILE"
        raise UserError(Problem(key, reason, f"dstune predict {path} {input_flag}", path))


def _load(main_model: _Found, others: Mapping[str, _Found]) -> Speaker:
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
        has_own = (folder / "tokenizer_config.json").is_file()
        place = {"pretrained_model_name_or_path": folder} if has_own else {}
        adapter = main_model if name == OWN and main_adapter else others[name]
        tokenizer = open_tokenizer(where=_key(name), **(source | place))
        voices[name] = _voice(tokenizer, adapter, architecture.is_encoder_decoder)
        _note_other_base(name, folder, base)
    plain = open_tokenizer(where="model.path", **source)
    voices[BASE] = _voice(plain, main_model, architecture.is_encoder_decoder)

    if vision := vision_files(base, architecture):
        for voice in voices.values():
            mark_vision(voice.tokenizer, vision)
    changed = {name for folder in folders.values() if folder for name in adapted_modules(folder)}
    model = _language_model(source, architecture, base, read_record(main_adapter) if main_adapter else {}, changed)
    longest = max(len(voice.tokenizer) for voice in voices.values())
    if longest > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(longest, mean_resizing=False)
    for name, folder in folders.items():
        assert folder is not None
        check_adapter(folder, model, _key(name))
        try:
            model = load_peft_adapter(model, folder, name)
        except (RuntimeError, ValueError) as error:
            reason = f"does not fit the model: {first_line(error)}"
            raise UserError(Problem(_key(name), reason, "give an adapter of this model", str(folder))) from error
    return Speaker(model, voices)


def _key(name: str) -> str:
    return "MODEL" if name == OWN else f"--adapter {name}"


def voice_of(folder: Path, tokenizer: Any) -> Voice:
    """Return how the adapter in `folder`, an export, is spoken to on a model that is in memory. tokenizer: of that model, for an
    adapter without one. Raises UserError where it writes no text."""
    if (folder / "tokenizer_config.json").is_file():
        tokenizer = open_tokenizer(folder, where="adapter", local_files_only=True)
    return _voice(tokenizer, _from_record(ModelConfig(path=str(folder)), str(folder)), encoder_decoder=False)


def _voice(tokenizer: Any, voice_model: _Found, encoder_decoder: bool) -> Voice:
    task = voice_model.task
    if encoder_decoder:
        mark_encoder_decoder(tokenizer)
        # A published one reads what it is given.
        task = task or next(kind.Config() for kind in TASKS.classes().values() if kind.encoder_decoder)
    chat = voice_model.chat and not encoder_decoder and bool(tokenizer.chat_template)
    return Voice(tokenizer, chat, voice_model.date, task)


def _note_other_base(name: str, folder: Path, base: ModelConfig) -> None:
    """Note an adapter on another base, which gives nonsense where the shapes fit; but the same base may have several names."""
    from dstune.checkpoint.model_folder import base_name

    trained_base = adapter_settings(folder)["base_model_name_or_path"]
    if trained_base != base_name(base):
        print(f"dstune: adapter {name} was trained on {trained_base}, and is put on {base.path}", file=sys.stderr)


def _architecture(source: dict[str, Any], requested: ModelConfig) -> Any:
    from transformers import AutoConfig

    with files_of_others("MODEL", requested.path, "its config.json", "give a hub id or a folder with a config.json"):
        return AutoConfig.from_pretrained(**source)


def _language_model(
    source: dict[str, Any],
    architecture: Any,
    requested: ModelConfig,
    record: Mapping[str, Any],
    adapted: Iterable[str] = (),
) -> Any:
    """Load the language model. record: of the model's own adapter; one of 4-bit weights speaks on such, where bitsandbytes is
    installed. adapted: names of the modules that adapters change."""
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
            **source, **options, dtype=dtype, use_safetensors=True, output_loading_info=True
        )
    absent = sorted(loading["missing_keys"])
    if absent:
        reason = f"is no language model: it has no weights for {', '.join(absent[:2])}"
        raise UserError(Problem("MODEL", reason, "give a model that writes text", requested.path))
    keep_layout(model)
    return model
