"""The reference of an export: what the trained model answers to held-out rows, so that a server can be compared with it.

The model is built from the checkpoint, as in training, and not from the exported files: the reference is to find their mistakes.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

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
from dstune.data.build import prepare
from dstune.data.problems import RowError
from dstune.data.recorded_files import changed_files as changed_files_of_rows
from dstune.generation.answers import placed_images, write_texts
from dstune.inference.reference_images import Answer, drawn_row
from dstune.inference.reference_rows import held_out_rows, render_turn, training_rows
from dstune.inference.resolve_model import base_of, with_local_files
from dstune.inference.rows import Query
from dstune.models.load import load_model, load_tokenizer, model_folder
from dstune.protocols import method_of, task_of
from dstune.zero import accelerator

ALONE = RankEnv(0, 1, 0, 1, "alone")
HELD_OUT = "held out"
"""`part` of a reference: rows that the run held out."""
TRAINING = "training"
"""`part` of a reference: training rows, of a run that held out none."""
CHANGED = "changed"
"""`part` of a reference: rows of the run's files, which changed since it was trained."""
UNTRAINED = "base"
"""`part` of a reference: fixed conversations, of a model that no run has trained."""


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
    """Write `reference.json` to `folder`, an export of the run, unless it is there. Loads the model in fp32.

    The reference keeps the digests that the export was written with. If a file was edited since then, a server refuses the export
    until `renew_reference` accepts the edit.

    Returns why the export can have no reference; an empty string if it has one now.
    Raises UserError if the run's data or model are gone.
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
    """Write a new `reference.json` for an export that was edited on purpose. Loads the model in fp32.

    The run's model answers the held-out rows as the edited template and tokenizer render them. The digests are those of the
    edited files.

    Raises UserError if `folder` is no export of the run, or can have no reference.
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
        recorded = object_in(folder / REFERENCE_FILE).get("edited")
        earlier_changes = [text for text in recorded if isinstance(text, str)] if isinstance(recorded, list) else []
        if all_changes := list(dict.fromkeys([*earlier_changes, *changes])):
            made.reference["edited"] = all_changes
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
"""System text, question and answer of each conversation on which a model that no run has trained is compared."""


def base_reference(model: ModelConfig) -> dict[str, Any]:
    """Make the reference of a language model that no run has trained: its log-probabilities of `CONVERSATIONS`.

    Transformers computes them in fp32. An engine with the same weights, tokenizer and template agrees with them.

    Raises NoReference for an encoder-decoder, UserError if the model cannot be loaded.
    """
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
            turn = render_turn(
                {"messages": [*messages, {"role": "assistant", "content": answer, "weight": 1}]}, config, tokenizer
            )
        except UserError:  # the template takes no system text
            turn = None
        if turn is not None:
            rows.append({"messages": messages, "prompt_ids": turn.prompt, "target_ids": turn.target})
            last = Answer(answer, turn.target)
    if rows and tokenizer.chat_template:
        drawn = drawn_row(tokenizer, task_of(config.task).template_date, "What is in this picture?", last)
        rows += [] if drawn is None else [drawn]
    if not rows:
        raise NoReference("its chat template renders none of the conversations that are used to compare models")
    body = load_model(config, tokenizer, (), torch.float32)
    _refuse_encoder_decoder(body)
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


def _refuse_encoder_decoder(body: Any) -> None:
    """Raise NoReference for an encoder-decoder."""
    if body.config.is_encoder_decoder:
        raise NoReference("no engine of dstune serve takes an encoder-decoder")


class _Made(NamedTuple):
    reference: dict[str, Any]
    other_prompts: int
    """As in `Renewal`."""


def _make(folder: Path, run_dir: Path, record: Mapping[str, Any], *, edited: bool = False) -> _Made:
    """Make the reference of the export in `folder`.

    edited: whether the template and tokenizer in `folder` render the rows, instead of the run's.

    Raises NoReference, and UserError if the run's data or model are gone.
    """
    try:
        config = read_run(run_dir / "run.yaml", use=Use.rows).config
    except UserError as error:  # nothing shows that these rows are the user's
        raise NoReference(f"{error.problems[0].where}: {error.problems[0].reason}") from None
    if store.newest(run_dir) is None:
        raise NoReference("the run kept no checkpoint")
    checkpoint = find_checkpoint(run_dir, str(record.get("step", "last")))
    tokenizer = load_tokenizer(config.model)
    served = _edited_tokenizer(folder, config, tokenizer) if edited else tokenizer
    try:
        data = prepare(config, tokenizer, ALONE, cache_root(), write=write_texts)
    except UserError as error:
        raise NoReference(str(error)) from None
    rows, part = list(held_out_rows(config, data, tokenizer, served)), HELD_OUT
    if not rows:
        rows, part = list(training_rows(config, data, tokenizer, served)), TRAINING
    if changed_files_of_rows(run_dir, config):
        part = CHANGED
    if not rows:
        raise NoReference("the run held out no rows, and none of its first training rows can be asked again")
    other_prompts = sum(row.pop("other_prompt", False) for row in rows)
    try:
        module, body = _load_as_trained(config, checkpoint, tokenizer)
    except KeyError as error:  # the methods features and importance save only what they train
        raise NoReference(f"the checkpoint does not hold {error.args[0]}, which the run did not train") from None
    _refuse_encoder_decoder(body)
    task = task_of(config.task)
    is_adapter = (folder / "adapter_config.json").is_file()
    if task.generates:
        answered_rows = _score_rows(rows, module, is_adapter=is_adapter)
    else:
        labels = tuple(store.read_state(checkpoint)["labels"])
        predictor = task.predictor()(config, module, task.head(body), served, labels)
        question = task.question(labels, config.data)
        try:
            requests = [question.query(row["row"], "") for row in rows]
        except RowError as error:  # a row format of its own, which no client sends
            raise NoReference(f"a server cannot be asked its held-out rows: {error}") from None
        trained_ids = [row["ids"] for row in rows]
        answered_rows = _answer_rows(predictor, requests, rows)
        if edited:
            other_prompts = sum(row["ids"] not in trained_ids for row in answered_rows)
    base = base_of(folder, ModelConfig()) if is_adapter else None
    reference = {
        "format": 2,
        "dtype": "float32",
        "template_date": task.template_date,
        "step": record.get("step"),
        "part": part,
        "files": digest_files(folder, None if base is None else base_folder(base.path, base.revision)),
        "rows": answered_rows,
    }
    return _Made(reference, other_prompts)


def _edited_tokenizer(folder: Path, config: RunConfig, tokenizer: Any) -> Any:
    """Return the tokenizer and template in `folder`. A GGUF file holds its own vocabulary: only the template next to it is read."""
    if (folder / "tokenizer_config.json").is_file():
        return load_tokenizer(model_of_export(config.model, folder))
    edited = copy.deepcopy(tokenizer)
    if (template := folder / "chat_template.jinja").is_file():
        edited.chat_template = read_file(template).decode("utf-8")
    return edited


def _write(folder: Path, reference: Mapping[str, Any]) -> None:
    """Write `reference.json`, readable by its owner alone. Raises NoReference."""
    try:
        files.write(folder / REFERENCE_FILE, json.dumps(reference, ensure_ascii=False) + "\n", mode=0o600)
    except OSError as error:
        raise NoReference(str(error.strerror)) from None


def _load_as_trained(config: RunConfig, checkpoint: Path, tokenizer: Any) -> tuple[Any, Any]:
    """Return (the trained module, adapters included; the transformers model in it), in fp32."""
    config = plain(config)
    labels = tuple(store.read_state(checkpoint)["labels"])
    body = load_model(config, tokenizer, labels, torch.float32)
    module = method_of(config.method).apply(body, config)
    load_trained(module, checkpoint)
    return module.to(accelerator.kind()).eval(), body


def _score_rows(rows: list[dict[str, Any]], module: Any, *, is_adapter: bool) -> list[dict[str, Any]]:
    """Return the rows with the log-probability of each target token.

    is_adapter: whether the export is an adapter. Then the rows also get `base_logprobs`, those of the model without it: the
    difference is what an engine that applies the adapter has to show.
    """
    from dstune.models.peft_import import peft

    image_inputs = [row.pop("inputs", {}) for row in rows]
    scored_rows = [_scored(row, module, images) for row, images in zip(rows, image_inputs, strict=True)]
    if not (is_adapter and isinstance(module, peft.PeftModel)):
        return scored_rows
    with module.disable_adapter():
        base_rows = [_scored(row, module, images) for row, images in zip(rows, image_inputs, strict=True)]
    return [scored | {"base_logprobs": base["logprobs"]} for scored, base in zip(scored_rows, base_rows, strict=True)]


def _scored(row: dict[str, Any], module: Any, images: Mapping[str, torch.Tensor] | None = None) -> dict[str, Any]:
    """Return `row` with the log-probability of each target token. images: model inputs made from the images of the prompt."""
    ids = [*row["prompt_ids"], *row["target_ids"]]
    device = next(module.parameters()).device
    with torch.inference_mode():
        image_inputs = placed_images(images or {}, module)
        logits = module(input_ids=torch.tensor([ids], device=device), use_cache=False, **image_inputs).logits[0]
    count = len(row["target_ids"])
    logprobs = logits[-count - 1 : -1].float().log_softmax(-1)
    targets = torch.tensor(row["target_ids"], device=logprobs.device)
    return {**row, "logprobs": logprobs.gather(1, targets[:, None])[:, 0].tolist()}


def _answer_rows(predictor: Any, queries: list[Query], rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows of an encoder with their tokens and answers; rows that it cannot answer are left out."""
    ids: list[list[int]] = [[] for _ in queries]
    for sample in predictor.samples(queries):
        ids[sample.row] += sample.input_ids.tolist()
    answers = predictor.answers(queries, 8, all_labels=True)
    return [
        {"row": row["row"], "ids": row_ids, "answer": answer}
        for row, row_ids, answer in zip(rows, ids, answers, strict=True)
        if "problem" not in answer
    ]
