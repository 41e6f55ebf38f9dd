"""Compute the digest of everything that prepared samples depend on; it names their cache entry."""

from __future__ import annotations

import inspect
import json
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import Any

import tokenizers
import transformers
import xxhash

from dstune.config.architectures import is_encoder_decoder, marked_stops, vision_of
from dstune.config.forgetting import mixes_in
from dstune.config.multi_task import tasks_of
from dstune.config.schema import RunConfig
from dstune.core import plugins
from dstune.data import sources
from dstune.data.augment.rewrite import TextWriter, identity
from dstune.data.augment.words import KEY as SYNONYMS_KEY
from dstune.data.clean.extras import versions
from dstune.data.images.store import root_of_images
from dstune.data.prompts import prompt_count
from dstune.data.row_sources import Input, Inputs
from dstune.data.swaps import KEY as SWAPS_KEY
from dstune.data.template_date import freeze_date
from dstune.protocols import ROW_FORMATS, RowFormat, Task, task_of


def fingerprint(config: RunConfig, tokenizer: Any, inputs: Inputs, write: TextWriter | None = None) -> str:
    """Return the digest of everything that the samples depend on. The weights of a mixture only decide the order: they are not
    part of it. write: see `build.prepare`."""
    data = config.data
    state = json.loads(tokenizer.backend_tokenizer.to_str()) if tokenizer.is_fast else tokenizer.get_vocab()
    # Remnants of the tokenizer's last call.
    state.pop("truncation", None)
    state.pop("padding", None)
    template = json.dumps(tokenizer.chat_template, sort_keys=True)
    task = task_of(config.task)
    if task.conversational:  # the date counts only if the template prints it
        template = freeze_date(template, task.template_date)
    terms = config.evaluate.counterfactual
    swap_files = sources.expand(terms, SWAPS_KEY) if terms else []
    parts = {
        "files": {
            part: {name: _rows_digest(source) for name, source in sources_of_part.items()}
            for part, sources_of_part in inputs.items()
        },
        "replay": mixes_in(config),
        "mixture": [
            [name, source.format, source.columns, source.max_rows, source.task, source.prompt]
            for name, source in data.mixture.items()
        ],
        "tokenizer": [
            is_encoder_decoder(tokenizer),
            marked_stops(tokenizer),
            state,
            template,
            {key: str(value) for key, value in tokenizer.special_tokens_map.items()},
            str(getattr(tokenizer, "response_schema", None)),  # may contain the marks of reasoning
        ],
        "task": task.row_key(),
        "prompt_template": config.model.prompt_template,
        "data": [
            data.format,
            data.columns,
            data.text_rows,
            data.max_length,
            asdict(data.split),
            data.max_rows,
            data.on_bad_row,
            *([data.image_folder] if data.image_folder else []),
        ],
        **_vision_digest(config, tokenizer, inputs),
        "augment": _augment_digest(config),
        "prompts": prompt_count(config),
        "evaluate": [config.evaluate.slices, [sources.fingerprint(source) for source in swap_files]],
        "clean": [asdict(data.clean), versions(data.clean)],
        "code": [xxhash.xxh3_64_hexdigest(file.read_bytes()) for file in _code(config, write)],
        "versions": [transformers.__version__, tokenizers.__version__],
    }
    if plugin_digests := plugins.digests("task", "row format"):
        parts["plugins"] = plugin_digests
    text = json.dumps(
        parts, sort_keys=True, default=lambda value: value.name if isinstance(value, Enum) else str(value)
    )
    return xxhash.xxh3_128_hexdigest(text.encode("utf-8", "surrogatepass"))


def _vision_digest(config: RunConfig, tokenizer: Any, inputs: Inputs) -> dict[str, Any]:
    """Return what decides how images become text and inputs, and the folders that relative paths start from; empty for a model
    that does not see."""
    vision = vision_of(tokenizer)
    if vision is None or not vision.has_processor:
        return {}
    folders = {
        part: {
            name: [str(root_of_images(config.data.image_folder, file.path)) for file in source.files]
            for name, source in sources_of_part.items()
        }
        for part, sources_of_part in inputs.items()
    }
    processor = {key: value for key, value in asdict(vision).items() if key not in ("path", "revision")}
    return {"vision": processor, "image_folders": folders}


def _code(config: RunConfig, write: TextWriter | None) -> list[Path]:
    """Return the files whose code makes the samples: this package, the rooms of the run's tasks and their formats, and where models
    rewrite rows, the file of `write`."""
    tasks = [task_of(task) for task in (config.task, *tasks_of(config).values())]
    classes = {type(task) for task in tasks} | {ROW_FORMATS[name] for task in tasks for name in task.formats}
    files = set(Path(__file__).parent.rglob("*.py"))
    for base in {base for cls in classes for base in cls.__mro__ if base not in (Task, RowFormat, object)}:
        file = Path(inspect.getfile(base))
        files |= set(file.parent.glob("*.py")) if file.name == "__init__.py" else {file}
    if config.data.augment.models and write is not None:
        files.add(Path(inspect.getfile(write)))
    return sorted(files)


def _augment_digest(config: RunConfig) -> list[Any]:
    augment = config.data.augment
    if not augment.on:
        return []
    files = sources.expand(augment.synonyms, SYNONYMS_KEY) if augment.synonyms else []
    models = [identity(path) for path in augment.models]
    return [asdict(augment), [sources.fingerprint(file) for file in files], models]


def _rows_digest(source: Input) -> list[Any]:
    """Return what identifies the rows of a source: its files' digests, or for a stream what its first block depends on."""
    if source.stream is None:
        return [digest for _, digest in source.file_digests]
    return [source.stream.identity(), source.config.trainer.seed, source.config.data.stream_rows]
