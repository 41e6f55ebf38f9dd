"""Proves that an engine answers as the trained model does.

An export contains a reference (`dstune.inference.reference`): held-out rows with the tokens of training, the log-probabilities of
their targets, and digests of the files on which all other answers depend. The files are compared first; then the engine renders
the same rows and scores the same tokens.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dstune.checkpoint.answer_files import base_folder, changed_files, digest_files, valid_digests
from dstune.checkpoint.contents import missing_contents
from dstune.checkpoint.record import read_record
from dstune.core.errors import DstuneError
from dstune.core.parsing import parse_json, read_file
from dstune.core.paths import REFERENCE_FILE
from dstune.inference.bounds import BOUNDS, difference
from dstune.serve.engines.base import Engine, Unprovable
from dstune.serve.images import shows_image
from dstune.serve.source import Source

MOST_BYTES = 64 << 20
"""The largest reference that is read."""

EFFECT = 10
"""If its reference does not hold the base's log-probabilities, an adapter must change at least one row by this many times the
bound."""

SHARE = 0.5
"""The least share of the change measured in training that the engine must show; an engine that does not load the adapter shows none
of it."""
LEAST_COMPARED = 0.5
"""The least share of the rows for which an engine must report log-probabilities."""
ROWS_OF_EFFECT = 8
"""How many of the rows that training changed most are also scored by the base."""


RENEW = "`dstune export RUN --reference`"


PARTS = {
    "changed": "on rows of files that changed since the training",
    "training": "on training rows, since none were held out",
    "base": "compared with transformers' answers, since dstune did not train this model",
}
"""What a proof says about a reference without held-out rows, by its `part`."""


class Refused(DstuneError):
    """The engine does not answer as the trained model does."""


@dataclass(frozen=True)
class Proof:
    """The result of comparing a served model with its reference."""

    status: str
    """`proven`, `unproven`, or `base`: the untuned model beneath an adapter, which needs no proof."""
    detail: str = ""
    rows: int = 0
    difference: float | None = None
    """The largest difference measured, as `BOUNDS` defines it."""
    bound: float | None = None
    effect: float | None = None
    """For an adapter, the largest difference from its base."""
    dtype: str = ""

    def __str__(self) -> str:
        if self.status != "proven":
            return f"{self.status}: {self.detail}" if self.detail else self.status
        effect = "" if self.effect is None else f", {self.effect:.2g} from its base"
        detail = f"; {self.detail}" if self.detail else ""
        return f"proven: {self.rows} rows, tokens equal, difference {self.difference:.2g} (at most {self.bound:g}){effect}{detail}"


def read_reference(folder: Path | None) -> dict[str, Any] | None:
    """Read the reference; None if there is none. Raises Refused if the file is not a reference."""
    path = None if folder is None else folder / REFERENCE_FILE
    if path is None or not path.is_file():
        return None
    try:
        reference = parse_json(read_file(path, MOST_BYTES))
        rows = reference["rows"]
        if reference["format"] not in (1, 2) or not rows or not all(isinstance(row, dict) for row in list(rows)):
            raise ValueError("has another format, or no rows")
        if reference["format"] == 2 and valid_digests(reference["files"]) is None:
            raise ValueError("its digests of files are not valid")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Refused(f"{path} cannot be read: {error}; `dstune export` writes a new one") from None
    return dict(reference)


async def prove(engine: Engine, name: str, source: Source, base: str | None = None) -> Proof:
    """Compare the answers of the model served as `name` with the reference of `source`. base: for an adapter, the name under which
    its base is served. Raises Refused if it answers as another model, EngineDown."""
    reference = read_reference(source.reference or source.folder)
    if reference is None:
        detail = "the model has no reference: `dstune export` stores one, `--prove` makes one of a model as it is"
        return Proof("unproven", detail, dtype=engine.dtype)
    rows = reference["rows"]
    await asyncio.to_thread(_refuse_other_files, name, source, reference)
    try:
        proof = await (_language(engine, name, rows, base) if source.generates else _encoder(engine, name, rows))
    except Unprovable as error:
        return Proof("unproven", str(error), dtype=engine.dtype)
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
        reason = f"what it answers cannot be compared with its {REFERENCE_FILE} ({type(error).__name__}: {error})"
        raise Refused(f"{name}: {reason}; `dstune export` writes a new one") from error
    if lacking := await asyncio.to_thread(_missing_files, source):
        return replace(proof, status="unproven", detail=f"{lacking}: `dstune export` writes a whole model")
    if "files" not in reference:
        detail = f"its reference is of an earlier version, without digests of files: {RENEW} renews it"
        return replace(proof, status="unproven", detail=detail)
    edited = reference.get("edited")
    edits = f"edited since its training: {', '.join(map(str, edited))}" if isinstance(edited, list) and edited else ""
    part = PARTS.get(str(reference.get("part")), "")
    return replace(proof, detail="; ".join(filter(None, (proof.detail, part, edits, engine.unseen_settings))))


def _refuse_other_files(name: str, source: Source, reference: Mapping[str, Any]) -> None:
    """Raises Refused if files that decide answers differ from those of the reference."""
    if "files" not in reference or source.folder is None:
        return
    base = base_folder(source.base, source.base_revision) if source.adapter else None
    try:
        changes = changed_files(reference["files"], digest_files(source.folder, base))
    except OSError as error:
        raise Refused(f"{name} cannot be compared with its {REFERENCE_FILE}: {error}") from None
    if changes:
        raise Refused(
            f"{name} was edited since it was exported: {'; '.join(changes)}. Export it again, or accept the edit: {RENEW}"
        )


def _missing_files(source: Source) -> str:
    """Return which exported files, or which base, the folder of a full model is missing; empty if nothing."""
    if source.folder is None or source.adapter:
        return ""
    record = read_record(source.folder)
    base, revision = record.get("base_model"), record.get("revision")
    is_hub_id = isinstance(base, str) and "/" in base  # for a local folder, the record holds the last part of its path
    folder = base_folder(str(base), revision if isinstance(revision, str) else None) if is_hub_id else None
    return missing_contents(source.folder, record, folder)


Scored = tuple[Mapping[str, Any], list[float]]
"""A row of the reference, with the log-probabilities that the engine reports for its first targets."""


async def _language(engine: Engine, name: str, rows: Sequence[Mapping[str, Any]], base: str | None) -> Proof:
    """Prove a language model. Raises Refused, Unprovable, EngineDown."""
    image_rows = sum(map(shows_images, rows))
    if image_rows and not engine.reads_images:
        rows = [row for row in rows if not shows_images(row)]
        if not rows:
            raise Unprovable(f"the engine {engine.name} reads no images, and all rows of the reference show some")
    for number, row in enumerate(rows, 1):  # tokens first: some engines report nothing else
        if not row.get("ids_only"):
            _refuse_other_ids(name, number, await engine.prompt_ids(name, row), row["prompt_ids"])
    bound = _allowed_difference(engine)
    largest = 0.0
    scored: list[Scored] = []
    for number, row in enumerate(rows, 1):
        logprobs = await _logprobs(engine, name, row)
        measured = difference(logprobs, row["logprobs"][: len(logprobs)], engine.dtype)
        if not measured <= bound:
            raise Refused(
                f"{name} is not the model that was trained: the log-probabilities of row {number} of its reference differ by "
                f"{measured:.3g}, {engine.dtype} allows {bound:g}. Another base, revision, adapter or number format is loaded."
            )
        largest = max(largest, measured)
        if logprobs:
            scored.append((row, logprobs))
    if len(scored) < max(LEAST_COMPARED * len(rows), 1):
        raise Unprovable(f"the engine reports log-probabilities of {len(scored)} of {len(rows)} rows of the reference")
    effect = None if base is None else await _measure_effect(engine, name, base, scored)
    scored_image_rows = sum(shows_images(row) for row, _ in scored)
    detail = _detail_about_images(image_rows, scored_image_rows, engine)
    return Proof("proven", detail, len(scored), largest, bound, effect, engine.dtype)


async def _measure_effect(engine: Engine, name: str, base: str, scored: Sequence[Scored]) -> float:
    """Return the largest difference between an adapter and its base. Raises Refused if it is less than training measured."""
    effect = Effect([row for row, _ in scored], engine.dtype)
    for row, logprobs in scored:
        if effect.needs(row):
            effect.add_row(row, logprobs, await _logprobs(engine, base, row))
    if reason := effect.problem():
        raise Refused(
            f"{name} has no effect: {reason}. Its weights are zeros, or their names are not those of the model."
        )
    return effect.largest


def shows_images(row: Mapping[str, Any]) -> bool:
    """Return whether the messages of a reference's row contain images."""
    return any(map(shows_image, row.get("messages", ())))


async def _logprobs(engine: Engine, name: str, row: Mapping[str, Any]) -> list[float]:
    if shows_images(row):
        return await engine.logprobs_with_images(name, row)
    return await engine.logprobs(name, row["prompt_ids"], row["target_ids"])


def _detail_about_images(image_rows: int, scored: int, engine: Engine) -> str:
    """Return what a proof says about the reference's rows with images; empty if there are none. scored: how many of them the engine
    scored."""
    if not image_rows:
        return ""
    if not engine.reads_images:
        return f"on text alone: the engine {engine.name} reads no images"
    return f"{scored} of these rows show images" if scored else "on text alone: the engine scored no prompt with images"


class Effect:
    """Compares an adapter's effect on its base's log-probabilities with the effect in training. Numerical noise does not point in
    the direction of the change, so projecting the engine's change of each target onto that of training finds even a small
    effect."""

    def __init__(self, rows: Sequence[Mapping[str, Any]], dtype: str):
        """rows: the reference's rows for which the engine reports log-probabilities."""
        self._dtype = dtype
        self.largest = 0.0
        """The largest difference of a row from the base."""
        self._has_base_logprobs = all("base_logprobs" in row for row in rows)
        self._projection = self._squared_length = 0.0
        """Sums over targets: the product of the engine's change and that of training, and the square of the latter."""
        self._probed = rows
        if self._has_base_logprobs:
            self._probed = sorted(rows, key=_squared_change, reverse=True)[:ROWS_OF_EFFECT]

    def needs(self, row: Mapping[str, Any]) -> bool:
        """Return whether the base must score this row too."""
        if not self._has_base_logprobs:
            return self.largest < EFFECT * BOUNDS[self._dtype]
        return any(row is probed_row for probed_row in self._probed)

    def add_row(self, row: Mapping[str, Any], logprobs: Sequence[float], base_logprobs: Sequence[float]) -> None:
        """Add a row of the reference, with the engine's log-probabilities of its targets with the adapter and without."""
        self.largest = max(self.largest, difference(logprobs, base_logprobs, self._dtype))
        if self._has_base_logprobs:
            count = len(logprobs)  # an engine may report only the first targets
            changes = zip(row["logprobs"][:count], row["base_logprobs"][:count], strict=True)
            trained_change = [adapted - base for adapted, base in changes]
            self._squared_length += sum(value * value for value in trained_change)
            self._projection += sum(
                value * (adapted - base)
                for value, adapted, base in zip(trained_change, logprobs, base_logprobs, strict=True)
            )

    def problem(self) -> str:
        """Return why the effect is too small; empty if it is not."""
        if self._has_base_logprobs:
            share = self._projection / self._squared_length if self._squared_length else 0.0
            if share >= SHARE:
                return ""
            shown = f"it shows {share:.0%} of what it changed in training, at most {self.largest:.3g} from its base"
            return f"{shown}; {SHARE:.0%} is the least"
        if self.largest >= EFFECT * BOUNDS[self._dtype]:
            return ""
        return (
            f"in {len(self._probed)} rows it is at most {self.largest:.3g} from its base, less than {EFFECT} times the bound of "
            f"{BOUNDS[self._dtype]:g} (`dstune export` also stores the base's log-probabilities, which prove a smaller effect)"
        )


def _squared_change(row: Mapping[str, Any]) -> float:
    """Return the squared length of the change of a row's log-probabilities in training."""
    return sum((adapted - base) ** 2 for adapted, base in zip(row["logprobs"], row["base_logprobs"], strict=True))


async def _encoder(engine: Engine, name: str, rows: Sequence[Mapping[str, Any]]) -> Proof:
    """Prove an encoder. Raises Refused, Unprovable, EngineDown."""
    bound = _allowed_difference(engine)
    engine_answer = await engine.answers([row["row"] for row in rows])
    largest = 0.0
    for number, (row, ids, answer) in enumerate(
        zip(rows, engine_answer["ids"], engine_answer["answers"], strict=True), 1
    ):
        _refuse_other_ids(name, number, ids, row["ids"])
        numbers, expected = _numbers(answer), _numbers(row["answer"])
        if len(numbers) != len(expected):
            raise Refused(f"{name} gives {len(numbers)} numbers for row {number} of its reference, not {len(expected)}")
        is_vector = "vector" in answer
        measured = _distance(numbers, expected) if is_vector else difference(numbers, expected, engine.dtype)
        if not measured <= bound or _words(answer, engine.dtype) != _words(row["answer"], engine.dtype):
            raise Refused(
                f"{name} is not the model that was trained: its answer to row {number} of its reference differs by "
                f"{measured:.3g}, {engine.dtype} allows {bound:g}"
            )
        largest = max(largest, measured)
    return Proof("proven", "", len(rows), largest, bound, None, engine.dtype)


def _allowed_difference(engine: Engine) -> float:
    if engine.dtype not in BOUNDS:
        raise Unprovable(f"no bound is known for weights in {engine.dtype or 'an unknown number format'}")
    return BOUNDS[engine.dtype]


def _numbers(answer: Mapping[str, Any]) -> list[float]:
    """Return all numbers in an answer."""
    if "vector" in answer:
        return list(answer["vector"])
    if "probabilities" in answer:
        return [math.log(max(value, 1e-12)) for value in answer["probabilities"].values()]
    measured = (answer.get(name) for name in ("score", "no_answer", "predicted"))
    return [value for value in measured if isinstance(value, float)]


def _words(answer: Mapping[str, Any], dtype: str) -> Any:
    """Return tags and spans. A span is compared in fp32 only, since other formats decide near ties differently; how sure a reader
    is that there is no answer is compared as a number."""
    if "no_answer" in answer:
        return answer.get("predicted") if dtype == "float32" else None
    return None if _numbers(answer) else answer.get("predicted")


def _distance(vector: Sequence[float], expected: Sequence[float]) -> float:
    """Return the distance of two vectors as a share of the expected vector's length: single components of long vectors are small in
    any model."""
    return math.dist(vector, expected) / (math.hypot(*expected) or 1.0)


def _refuse_other_ids(name: str, row: int, engine_ids: Sequence[int], expected: Sequence[int]) -> None:
    if list(engine_ids) == list(expected):
        return
    pairs = zip(engine_ids, expected, strict=False)
    at = next(
        (number for number, (engine_id, trained_id) in enumerate(pairs) if engine_id != trained_id),
        min(len(engine_ids), len(expected)),
    )
    raise Refused(
        f"{name} is asked with another prompt than in training: row {row} of its reference has {len(expected)} tokens, the "
        f"engine makes {len(engine_ids)}, and they differ from token {at} on ({_around(engine_ids, at)}, in training "
        f"{_around(expected, at)}). Another chat template or tokenizer is loaded."
    )


def _around(ids: Sequence[int], at: int) -> str:
    return f"... {' '.join(map(str, ids[at : at + 4]))} ..." if at < len(ids) else "the end"
