"""What a trained model says of held-out rows, kept with its export, so that a server can be held against it.

The model is built as in training, from the checkpoint: not from the exported files, whose mistakes it is to find.
"""

from __future__ import annotations

import copy
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from dstune.checkpoint import store
from dstune.checkpoint.adapters import load_trained
from dstune.checkpoint.answer_files import (
    BASE,
    RECORDED,
    base_folder,
    changed_files,
    digest_files,
    record_files,
    valid_digests,
)
from dstune.checkpoint.export import find_checkpoint, model_of_export
from dstune.checkpoint.model_folder import plain
from dstune.checkpoint.record import read_record
from dstune.config.compose import compose
from dstune.config.overrides import quoted
from dstune.config.run_file import read_run
from dstune.config.schema import ModelConfig, RunConfig
from dstune.config.trust import Use
from dstune.core import files
from dstune.core.errors import Problem, UserError
from dstune.core.parsing import object_in, read_file
from dstune.core.paths import REFERENCE_FILE, cache_root
from dstune.core.rank_env import RankEnv
from dstune.data import sources
from dstune.data.build import prepare
from dstune.data.collate import NO_TARGET
from dstune.data.images.batch import prompt_inputs
from dstune.data.inputs import of_training
from dstune.data.prepared import PreparedData, Split
from dstune.data.problems import RowError
from dstune.data.rows import normalise, recognise
from dstune.data.special_tokens import decoder_prompt
from dstune.data.tokenize import RowTokenizer, conversation
from dstune.inference.reference_images import Allowance, Answer, RowImages, drawn_row
from dstune.inference.resolve_model import base_of, with_local_files
from dstune.inference.rows import Query
from dstune.models.generation import placed_images
from dstune.models.load import load_model, load_tokenizer, model_folder
from dstune.protocols import ROW_FORMATS, TASKS, method_of, task_of
from dstune.protocols.task_options import BuildsQueries
from dstune.zero import accelerator

ALONE = RankEnv(0, 1, 0, 1, "alone")
ROWS = 32
MOST_TOKENS = 1024
"""Of a row; longer ones are passed over, so that a reference takes seconds."""
MOST_TOKENS_WITH_IMAGES = 4096
"""Of a row with images, of which there are few: a photograph has a thousand tokens or more."""
LOOKED_AHEAD = 16
"""Samples among which that of the next training row is looked for."""
TRAINING = "training"
"""The part of a reference whose rows are training's own."""
UNTRAINED = "base"
"""The part of a reference of a model that no run has trained."""
MOST_PLACES = 512
"""Held-out rows that are looked at to find `ROWS`."""


class NoReference(Exception):
    """An export can have no reference; the text says why."""


@dataclass(frozen=True)
class Renewal:
    """What the renewal of a reference has accepted."""

    changes: tuple[str, ...]
    """What was edited since the export was written, a text for each file."""
    rows: int
    other_prompts: int
    """Rows whose prompt the edited files turn into other tokens than training saw."""


def add_reference(folder: Path, run_dir: Path) -> str:
    """Write `reference.json` to `folder`, an export of the run. Returns why there can be none; empty where there is one now.

    Files that were edited since the export was written are held against their digests of then, so a server refuses them
    until `renew_reference` accepts the edit. Loads the model in fp32. Raises UserError where the run's data or model are gone.
    """
    if (folder / REFERENCE_FILE).is_file():
        return ""
    record = read_record(folder)
    try:
        made = _make(folder, run_dir, record)
        exported = valid_digests(record.get(RECORDED))
        if exported is not None:
            base = {name: digest for name, digest in made.reference["files"].items() if name.startswith(BASE)}
            made.reference["files"] = exported | base
        _write(folder, made.reference)
    except NoReference as error:
        return f"{folder} gets no reference: {error}"
    return ""


def renew_reference(folder: Path, run_dir: Path) -> Renewal:
    """Write `reference.json` anew for an export that was edited on purpose: the run's model is asked the held-out rows as the
    edited template and tokenizer render them, and the files' digests are those of now.

    Loads the model in fp32. Raises UserError where the folder is no export of the run, or can have no reference.
    """
    record = read_record(folder)
    if "step" not in record:
        raise UserError(
            Problem("--reference", "there is no export of the run", f"dstune export {run_dir}", str(folder))
        )
    digests_before = valid_digests(object_in(folder / REFERENCE_FILE).get("files")) or valid_digests(
        record.get(RECORDED)
    )
    try:
        made = _make(folder, run_dir, record, edited=True)
        files = made.reference["files"]
        changes = [] if digests_before is None else changed_files(digests_before, files)
        earlier = object_in(folder / REFERENCE_FILE).get("edited")
        earlier = [text for text in earlier if isinstance(text, str)] if isinstance(earlier, list) else []
        if edited := list(dict.fromkeys([*earlier, *changes])):
            made.reference["edited"] = edited
        _write(folder, made.reference)
        record_files(folder)
    except NoReference as error:
        raise UserError(
            Problem("--reference", f"the export can have no reference: {error}", value=str(folder))
        ) from None
    return Renewal(tuple(changes), len(made.reference["rows"]), made.other_prompts)


CONVERSATIONS: tuple[tuple[str, ...], ...] = (
    ("", "What is the capital of France?", "Paris."),
    ("You answer in one word.", "Is the sun a star?", "Yes"),
    ("", "Write a haiku about rain.", "Soft rain on the roof,\na slow song the gutters sing,\nthe garden listens."),
    ("", "def add(a, b):", "    return a + b"),
    ("You are a translator.", "Guten Morgen, wie geht es dir?", "Good morning, how are you?"),
    ("", "2, 4, 8, 16", "32, 64, 128"),
    ("", "Résumé en une phrase : l'eau bout à 100 °C.", "À pression normale, l'eau bout à 100 degrés."),
    ("", '{"name": "Ada", "born": 1815}', "Ada was born in 1815."),
)
"""System text, question and answer of what a model without training of ours is compared on."""


def base_reference(model: ModelConfig) -> dict[str, Any]:
    """Return what a language model as it is says of fixed conversations, by transformers in fp32: what an engine that has the same
    weights, tokenizer and template says too.

    Raises NoReference for an encoder-decoder, UserError where it cannot be loaded."""
    config = compose([f"model.path={quoted(model.path)}", "task=chat", "data=files", "data.train=none.jsonl"]).config
    config = replace(config, model=with_local_files(replace(config.model, **_how_loaded(model))))
    tokenizer = load_tokenizer(config.model)
    rows = []
    for system, question, answer in CONVERSATIONS:
        messages = [{"role": "user", "content": question}]
        if system and (tokenizer.chat_template or ""):
            messages = [{"role": "system", "content": system}, *messages]
        if not tokenizer.chat_template:
            ids = [
                tokenizer(text, add_special_tokens=first)["input_ids"]
                for text, first in ((question, True), (answer, False))
            ]
            rows.append({"text": question, "ids_only": True, "prompt_ids": ids[0], "target_ids": ids[1]})
            continue
        try:
            turn = _rendered(
                {"messages": [*messages, {"role": "assistant", "content": answer, "weight": 1}]}, config, tokenizer
            )
        except UserError:  # a template that takes no system text
            turn = None
        if turn is not None:
            rows.append({"messages": messages, "prompt_ids": turn.prompt, "target_ids": turn.target})
            last = Answer(answer, turn.target)
    if rows and tokenizer.chat_template:
        drawn = drawn_row(tokenizer, task_of(config.task).template_date, "What is in this picture?", last)
        rows += [] if drawn is None else [drawn]
    if not rows:
        raise NoReference("its template renders none of the conversations that it would be compared on")
    body = load_model(config, tokenizer, (), torch.float32)
    if body.config.is_encoder_decoder:
        raise NoReference("no engine of dstune serve takes an encoder-decoder")
    module = body.to(accelerator.kind()).eval()
    return {
        "format": 2,
        "dtype": "float32",
        "template_date": task_of(config.task).template_date,
        "part": UNTRAINED,
        "files": digest_files(model_folder(config.model)),
        "rows": [_scored(row, module, row.pop("inputs", None)) for row in rows],
    }


def _how_loaded(model: ModelConfig) -> dict[str, Any]:
    return {"revision": model.revision, "trust_remote_code": model.trust_remote_code}


class _Made(NamedTuple):
    reference: dict[str, Any]
    other_prompts: int


def _make(folder: Path, run_dir: Path, record: Mapping[str, Any], *, edited: bool = False) -> _Made:
    """Make the reference. edited: rows are rendered by the template and tokenizer in `folder`, not by those of the run. Raises
    NoReference, and UserError where the run's data or model are gone."""
    try:
        config = read_run(run_dir / "run.yaml", use=Use.rows).config
    except UserError as error:  # rows that are not known to be the user's
        raise NoReference(f"{error.problems[0].where}: {error.problems[0].reason}") from None
    if store.newest(run_dir) is None:
        raise NoReference("the run kept no checkpoint")
    checkpoint = find_checkpoint(run_dir, str(record.get("step", "last")))
    tokenizer = load_tokenizer(config.model)
    served = _edited_tokenizer(folder, config, tokenizer) if edited else tokenizer
    try:
        data = prepare(config, tokenizer, ALONE, cache_root())
    except UserError as error:
        raise NoReference(str(error)) from None
    rows, part = list(_held_out(config, data, tokenizer, served)), "held out"
    if not rows:
        rows, part = list(_trained_on(config, data, tokenizer, served)), TRAINING
    if not rows:
        raise NoReference("the run held out no rows, and none of its first training rows can be asked again")
    other_prompts = sum(row.pop("other_prompt", False) for row in rows)
    try:
        module, body = _as_trained(config, checkpoint, tokenizer)
    except KeyError as error:  # features and importance save what they train, beside the model's own weights
        raise NoReference(f"the checkpoint does not hold {error.args[0]}, which the run kept as it was") from None
    if body.config.is_encoder_decoder:
        raise NoReference("no engine of dstune serve takes an encoder-decoder")
    task = task_of(config.task)
    inputs = [row.pop("inputs", {}) for row in rows]
    is_adapter = (folder / "adapter_config.json").is_file()
    if task.generates:
        from dstune.models.peft_import import peft

        scored = body if module is None else module
        described = [_scored(row, scored, images) for row, images in zip(rows, inputs, strict=True)]
        if is_adapter and isinstance(module, peft.PeftModel):
            with module.disable_adapter():  # what the adapter changes is what an engine has to show
                plain = [_scored(row, module, images)["logprobs"] for row, images in zip(rows, inputs, strict=True)]
            described = [
                row | {"base_logprobs": base_logprobs} for row, base_logprobs in zip(described, plain, strict=True)
            ]
    else:
        labels = tuple(store.read_state(checkpoint)["labels"])
        predictor = task.predictor()(config, module, task.head(body), served, labels)
        question = task.question(labels, config.data)
        try:
            requests = [question.query(row["row"], "") for row in rows]
        except RowError as error:  # a row format of its own, which no client sends
            raise NoReference(f"its held-out rows are none that can be asked: {error}") from None
        trained_ids = [row["ids"] for row in rows]
        described = _answered(predictor, requests, rows)
        if edited:
            other_prompts = sum(row["ids"] not in trained_ids for row in described)
    base = base_of(folder, ModelConfig()) if is_adapter else None
    reference = {
        "format": 2,
        "dtype": "float32",
        "template_date": task.template_date,
        "step": record.get("step"),
        "part": part,
        "files": digest_files(folder, None if base is None else base_folder(base.path, base.revision)),
        "rows": described,
    }
    return _Made(reference, other_prompts)


def _edited_tokenizer(folder: Path, config: RunConfig, tokenizer: Any) -> Any:
    """Return the tokenizer and template in `folder`. A GGUF file has its own vocabulary, so only the template beside it is read."""
    if (folder / "tokenizer_config.json").is_file():
        return load_tokenizer(model_of_export(config.model, folder))
    edited = copy.deepcopy(tokenizer)
    if (template := folder / "chat_template.jinja").is_file():
        edited.chat_template = read_file(template).decode("utf-8")
    return edited


def _write(folder: Path, reference: Mapping[str, Any]) -> None:
    """Raises NoReference."""
    try:
        files.write(folder / REFERENCE_FILE, json.dumps(reference, ensure_ascii=False) + "\n", mode=0o600)
    except OSError as error:
        raise NoReference(str(error.strerror)) from None


# -- rows -------------------------------------------------------------------------------------------------------------


def _held_out(config: RunConfig, data: PreparedData, tokenizer: Any, served: Any) -> Iterator[dict[str, Any]]:
    """Yield the first held-out rows as a client would ask them, with the tokens that training saw; where `served` is another
    tokenizer than the run's, with those that it gives."""
    split = data.validation or data.test
    if split is None or split.places is None:
        return
    places = json.loads(split.places.read_text(encoding="utf-8"))[:MOST_PLACES]
    raw = _fields(config, split.name, places)
    origins = np.arange(len(split.lengths)) if split.origins is None else split.origins
    row_count, allowance = 0, Allowance()
    for sample, origin in enumerate(origins.tolist()):
        if row_count == ROWS or origin >= len(places):
            break
        fields, source_config = raw.get(places[origin], (None, config))
        if fields is None or np.count_nonzero(origins[: sample + 1] == origin) > 1:
            continue
        row = _row(fields, source_config, split, sample, tokenizer, served, allowance)
        if row is not None:
            row_count += 1
            yield row


def _trained_on(config: RunConfig, data: PreparedData, tokenizer: Any, served: Any) -> Iterator[dict[str, Any]]:
    """Yield the first training rows in the same way, for a run that held out none: an engine with another template, base or
    adapter answers them otherwise too. Samples stand in the order of their rows, of which some were left out."""
    if config.data.streaming:
        return
    samples, at, row_count, allowance = min(len(data.train.lengths), MOST_PLACES), 0, 0, Allowance()
    files = [
        (file, source_config)
        for key, source_config in of_training(config).values()
        for file in sources.of_part(source_config.data, "train", key)
    ]
    rows = ((raw, source_config) for file, source_config in files for raw in sources.read(file))
    for raw, source_config in itertools.islice(rows, MOST_PLACES):
        if row_count == ROWS or at == samples:
            return
        if raw.fields is None:
            continue
        for sample in range(at, min(at + LOOKED_AHEAD, samples)):
            row = _row(raw.fields, source_config, data.train, sample, tokenizer, served, allowance)
            if row is not None:
                at, row_count = sample + 1, row_count + 1
                yield row
                break


def _fields(config: RunConfig, part: str, places: Iterable[str]) -> dict[str, tuple[Mapping[str, Any], RunConfig]]:
    """Return the columns of the rows at these places, with the configuration of their source.

    Prepared rows are found again by their content, so their places may be those of files that have moved since: files are
    compared by their names where these differ.
    """
    own_part = getattr(config.data, part) is not None
    configs = [(f"data.{part}", config)] if own_part else list(of_training(config).values())
    files = [
        (file, source_config)
        for key, source_config in configs
        for file in sources.of_part(source_config.data, part if own_part else "train", key)
    ]
    by_name = len({os.path.basename(str(file)) for file, _ in files}) == len(files)

    def key_of(place: str) -> str:
        return os.path.basename(place) if by_name else place

    missing = {key_of(place): place for place in places}
    fields_by_place: dict[str, tuple[Mapping[str, Any], RunConfig]] = {}
    for file, source_config in files:
        for raw in sources.read(file):
            if not missing:
                return fields_by_place
            if raw.fields is not None and (place := missing.pop(key_of(raw.place), None)):
                fields_by_place[place] = raw.fields, source_config
    return fields_by_place


def _row(
    fields: Mapping[str, Any],
    config: RunConfig,
    split: Split,
    number: int,
    tokenizer: Any,
    served: Any,
    allowance: Allowance,
) -> dict[str, Any] | None:
    """Build the row of the sample `number`. None where it cannot be asked in the same way, since training changed its text
    (`data.clean`) or cut it, and where it shows more images than are allowed."""
    task, sample = task_of(config.task), split.sample(number)
    try:
        fmt = recognise(fields, config.data.columns, config.data.format, config.task, "")
        row = normalise(fields, fmt, config.data.columns, config.task)
        if not task.generates:
            # A server may not have the plugin that reads rows of its own.
            sent = row if ROW_FORMATS[fmt].shape else fields
            query = task.as_query(sent, row) if isinstance(task, BuildsQueries) else dict(sent)
            return {"row": query, "ids": np.asarray(sample["input_ids"]).tolist()}
        return _language_row(row, config, split, sample, tokenizer, served, allowance)
    except (RowError, UserError):
        return None


def _language_row(
    row: dict[str, Any],
    config: RunConfig,
    split: Split,
    sample: Mapping[str, Any],
    tokenizer: Any,
    served: Any,
    allowance: Allowance,
) -> dict[str, Any] | None:
    """Return the turns up to the assistant's first one, or a text, with the tokens of what follows and, as `inputs`, what the model
    gets of images. Raises RowError."""
    trained = np.asarray(sample["input_ids"]).tolist()
    if "text" in row:
        if len(trained) < 2:
            return None
        cut = max(1, len(trained) // 2)
        return {"text": row["text"], "ids_only": True, "prompt_ids": trained[:cut], "target_ids": trained[cut:][:256]}
    if not row.keys() & {"messages", "prompt", "chosen"}:  # a source and its target
        start = len(decoder_prompt(sample, NO_TARGET))
        return {"ids_only": True, "prompt_ids": trained[:start], "target_ids": trained[start:]} if start else None
    messages = conversation(row)
    first = next((number for number, message in enumerate(messages) if message["role"] == "assistant"), 0)
    if not first:
        return None
    images = RowImages.of(split, sample, messages[:first])
    template_columns = {key: row[key] for key in ("tools", "chat_template_kwargs") if row.get(key)}
    trained_messages = [{**message, "weight": 1} for message in messages[: first + 1]]
    one_turn = {"messages": trained_messages, **template_columns, **images.entries()}
    trained_turn = _rendered(one_turn, config, tokenizer, images)
    if trained_turn is None or trained[: len(trained_turn.prompt) + 1] != [
        *trained_turn.prompt,
        trained_turn.target[0],
    ]:
        return None
    turn = trained_turn if served is tokenizer else _rendered(one_turn, config, served, images)
    if turn is None or not allowance.take(images):
        return None
    requested: dict[str, Any] = {"messages": messages[:first]}
    if images:
        requested["messages"] = images.shown(messages[:first])
        requested["inputs"] = prompt_inputs(split, [*turn.prompt, *turn.target], images.numbers)
        if isinstance(answer := messages[first].get("content"), str) and not messages[first].get("tool_calls"):
            requested["answer"] = answer
    if "tools" in template_columns:
        requested["tools"] = template_columns["tools"]
    if "chat_template_kwargs" in template_columns:
        requested["arguments"] = template_columns["chat_template_kwargs"]
    if not served.chat_template:
        requested = {"text": row["prompt"]} if "prompt" in row else {"ids_only": True}
    if turn.prompt != trained_turn.prompt:
        requested["other_prompt"] = True
    return {**requested, "prompt_ids": turn.prompt, "target_ids": turn.target}


class _Turn(NamedTuple):
    prompt: list[int]
    target: list[int]
    """The tokens of the assistant's first turn."""


def _rendered(
    one_turn: dict[str, Any], config: RunConfig, tokenizer: Any, images: RowImages | None = None
) -> _Turn | None:
    """Render the turn; None where it is cut, or trains nothing."""
    # Pairs of answers are not what a server is asked; the better one is a conversation.
    chats = TASKS["chat"].for_source(config.task, None)
    rows = RowTokenizer(tokenizer, chats, "messages", MOST_TOKENS_WITH_IMAGES if images else MOST_TOKENS)
    rows.use_images(images.files if images else None)
    samples = rows.samples([one_turn], [0])
    if len(samples) != 1 or samples[0].problem or samples[0].truncated:
        return None
    ids, answer = samples[0].input_ids.tolist(), np.flatnonzero(samples[0].columns["labels"] != NO_TARGET)
    start, end = int(answer[0]), int(answer[-1]) + 1
    return _Turn(ids[:start], ids[start:end])


# -- the model --------------------------------------------------------------------------------------------------------


def _as_trained(config: RunConfig, checkpoint: Path, tokenizer: Any) -> tuple[Any, Any]:
    """Return (what was trained, adapters included; the model of transformers in it), in fp32."""
    config = plain(config)
    labels = tuple(store.read_state(checkpoint)["labels"])
    body = load_model(config, tokenizer, labels, torch.float32)
    module = method_of(config.method).apply(body, config)
    load_trained(module, checkpoint)
    return module.to(accelerator.kind()).eval(), body


def _scored(row: dict[str, Any], module: Any, images: Mapping[str, torch.Tensor] | None = None) -> dict[str, Any]:
    """Return `row` with the log-probability of each target. images: what the model gets of those in the prompt."""
    ids = [*row["prompt_ids"], *row["target_ids"]]
    device = next(module.parameters()).device
    with torch.inference_mode():
        beside = placed_images(images or {}, module)
        logits = module(input_ids=torch.tensor([ids], device=device), use_cache=False, **beside).logits[0]
    count = len(row["target_ids"])
    logprobs = logits[-count - 1 : -1].float().log_softmax(-1)
    targets = torch.tensor(row["target_ids"], device=logprobs.device)
    return {**row, "logprobs": logprobs.gather(1, targets[:, None])[:, 0].tolist()}


def _answered(predictor: Any, queries: list[Query], rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return rows of an encoder with their tokens and answers; those without an answer are left out."""
    ids: list[list[int]] = [[] for _ in queries]
    for sample in predictor.samples(queries):
        ids[sample.row] += sample.input_ids.tolist()
    answers = predictor.answers(queries, 8, all_labels=True)
    return [
        {"row": row["row"], "ids": row_ids, "answer": answer}
        for row, row_ids, answer in zip(rows, ids, answers, strict=True)
        if "problem" not in answer
    ]
