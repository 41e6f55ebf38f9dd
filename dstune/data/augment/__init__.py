"""Make changed copies of training rows (`data.augment`): seeded, and never equal to a held-out row.

A copy depends only on the content of its row, its number and the seeds of `data.augment` and `data.split` (which is part of a
row's hash), not on other rows. What models write also depends on the order of the rows, since the texts of a batch are sampled
together.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pyarrow as pa

from dstune.config.augment_schema import AugmentConfig
from dstune.config.schema import RunConfig
from dstune.data.augment import words
from dstune.data.augment.rewrite import TextWriter, rewritten
from dstune.data.clean.rows import map_texts, row_hashes, texts
from dstune.data.ingest import ROW_SCHEMA, load_table
from dstune.data.labels import ChosenRows
from dstune.data.rows import canonical_json
from dstune.data.split import content_hash

TRIES = 5
"""Number of attempts to make a copy that equals no other row; a text of three words has few variants."""

MAX_EXAMPLES = 5
ROWS_AT_ONCE = 1000

Row = dict[str, Any]


@dataclass
class AugmentReport:
    """Counts of what augmentation did, for the data report."""

    copies: int = 0
    """Number of rows that were added."""
    changed: dict[str, dict[str, int]] = field(default_factory=dict)
    """By technique: the number of copies (`rows`) and of words that it changed."""
    left_out: dict[str, int] = field(default_factory=dict)
    """Number of copies that were not added, by reason: equal to a held-out row (`held_out`), equal to a training row or another
    copy (`repeated`), or with a text that a model left empty (`empty`)."""
    classes: dict[str, list[int]] = field(default_factory=dict)
    """Number of rows of each class before and after."""
    examples: list[dict[str, str]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if value or name == "copies"}


def augmented(
    train: ChosenRows,
    held_out: Iterable[ChosenRows],
    copied_places: np.ndarray,
    config: RunConfig,
    work: Path,
    write: TextWriter | None,
) -> tuple[ChosenRows, dict[str, Any]]:
    """Return the training rows followed by their copies, and the report.

    copied_places: the places in `train` of the rows to copy, int64. work: folder for the new table. write: lets the models of
    `data.augment.models` write; may be None without them.
    """
    settings, report = config.data.augment, AugmentReport()
    known_keys = {"held_out": _keys(held_out), "repeated": {int(key) for key in train.text_keys}}
    jobs = _jobs(train, copied_places, settings, report)
    made = _copies(train, jobs, settings, known_keys, report, config.data.split.seed, write)
    target = work / "train.augmented.arrow"
    origins = _write(train, made, target)
    table = load_table(
        target, train.table.files, config, train.table.format, train.table.rows_read, train.table.bad_rows
    )
    sources = None if train.table.sources is None else train.table.sources[train.indices][origins]
    table = replace(table, sources=sources, bad_examples=train.table.bad_examples)
    report.copies = len(made)
    if report.classes:
        assert table.labels is not None
        after = Counter(table.labels.tolist())
        report.classes = {label: [before[0], after[label]] for label, before in report.classes.items()}
    return ChosenRows(table, np.arange(len(table.hashes)), train.bad_rows), report.to_dict()


def _keys(parts: Iterable[ChosenRows]) -> set[int]:
    return {int(key) for rows in parts for key in rows.text_keys}


def _jobs(
    train: ChosenRows, copied_places: np.ndarray, settings: AugmentConfig, report: AugmentReport
) -> list[tuple[int, int]]:
    """Return (place of the row, number of the copy) for each copy to make."""
    jobs = [(int(place), number) for place in copied_places for number in range(settings.copies)]
    if not settings.balance:
        return jobs
    assert train.table.labels is not None
    labels = train.table.labels[train.indices[copied_places]]
    hashes = train.hashes
    names, counts = np.unique(labels, return_counts=True)
    report.classes = {str(name): [int(count)] for name, count in zip(names, counts, strict=True)}
    most = max(int(count) for count in counts) * (1 + settings.copies)
    for name, count in zip(names, counts, strict=True):
        # In the order of hashes, so that the rows that get one more copy do not depend on the order of the file.
        places = copied_places[labels == name]
        places = places[np.argsort(hashes[places], kind="stable")]
        missing = most - int(count) * (1 + settings.copies)
        jobs += [(int(places[extra % count]), settings.copies + extra // int(count)) for extra in range(missing)]
    return jobs


def _copies(
    train: ChosenRows,
    jobs: list[tuple[int, int]],
    settings: AugmentConfig,
    known_keys: Mapping[str, set[int]],
    report: AugmentReport,
    split_seed: int,
    write: TextWriter | None,
) -> list[tuple[int, str, int]]:
    """Return (place of the original row, the copy as JSON text, its hash) for each copy that equals no known row.

    known_keys: the text keys of known rows, by the reason to leave such a copy out; keys of new copies are added.
    """
    synonyms = words.read_synonyms(settings.synonyms) if settings.synonyms else {}
    hashes = train.hashes
    rows = [json.loads(train.table.data[int(train.indices[place])]["row"]) for place, _ in jobs]
    if settings.models:
        assert write is not None, "whoever prepares rows with data.augment.models gives a writer"
        rows = _rewrite(rows, settings, report, write)
    left_out: Counter[str] = Counter()
    made = []
    for (place, number), row in zip(jobs, rows, strict=True):
        why = ""
        for attempt in range(TRIES):
            choose = Random(f"{settings.seed}:{hashes[place]}:{number}:{attempt}")
            copy, counts = _changed(row, settings, synonyms, choose)
            key = row_hashes(copy)[1]
            why = next((name for name, keys in known_keys.items() if key in keys and settings.changes), "")
            if not all(text.strip() for text in texts(copy)):
                why = "empty"
            if not why:
                break
        if why:
            left_out[why] += 1
            continue
        known_keys["repeated"].add(key)
        for name, count in counts.items():
            change_counts = report.changed.setdefault(name, {"rows": 0, "words": 0})
            change_counts["rows"] += count > 0
            change_counts["words"] += count
        content = canonical_json(copy)
        made.append((place, content.decode("utf-8"), content_hash(content, split_seed)))
        if len(report.examples) < MAX_EXAMPLES:
            text_before = " | ".join(texts(json.loads(train.table.data[int(train.indices[place])]["row"])))
            change_text = f"{text_before} -> {' | '.join(texts(copy))}"
            report.examples.append({"place": train.table.place(train.indices[place]), "text": change_text})
    report.left_out = dict(left_out)
    return made


def _rewrite(rows: list[Row], settings: AugmentConfig, report: AugmentReport, write: TextWriter) -> list[Row]:
    """Return the rows with every text rewritten by models."""
    originals = [text for row in rows for text in texts(row)]
    answers = iter(rewritten(originals, settings, write))
    copies = [map_texts(row, lambda _: next(answers)) for row in rows]
    report.changed["models"] = {
        "rows": sum(old_row != new_row for old_row, new_row in zip(rows, copies, strict=True)),
        "words": 0,
    }
    return copies


def _changed(
    row: Row, settings: AugmentConfig, synonyms: Mapping[str, list[str]], choose: Random
) -> tuple[Row, dict[str, int]]:
    """Return a changed copy of the row, and the number of words that each technique changed."""
    counts: Counter[str] = Counter()

    def change(text: str) -> str:
        if synonyms:
            text, count = words.replaced(text, synonyms, settings.synonym_share, choose)
            counts["synonyms"] += count
        if settings.swap:
            text, count = words.swapped(text, settings.swap, choose)
            counts["swap"] += count
        if settings.delete:
            text, count = words.deleted(text, settings.delete, choose)
            counts["delete"] += count
        return text

    return map_texts(row, change), dict(counts)


def _write(train: ChosenRows, made: list[tuple[int, str, int]], target: Path) -> np.ndarray:
    """Write the rows of `train`, followed by the copies, as a new table. Returns the place in `train` of each row's original."""
    count = len(train.indices)
    origins = np.concatenate([np.arange(count), np.array([place for place, _, _ in made], dtype=np.int64)])
    with pa.OSFile(str(target), "wb") as stream, pa.ipc.new_stream(stream, ROW_SCHEMA) as writer:
        for start in range(0, len(origins), ROWS_AT_ONCE):
            some = np.arange(start, min(start + ROWS_AT_ONCE, len(origins)))
            batch = train.table.data.with_format("arrow")[train.indices[origins[some]]]
            columns = {name: batch[name].combine_chunks() for name in batch.column_names}
            columns["number"] = pa.array(some, pa.int64())
            copied = [made[place - count] for place in some.tolist() if place >= count]
            if copied:
                count_before = len(some) - len(copied)
                for name, values in (("row", [row for _, row, _ in copied]), ("hash", [value for *_, value in copied])):
                    kind = ROW_SCHEMA.field(name).type
                    columns[name] = pa.concat_arrays(
                        [columns[name].slice(0, count_before).cast(kind), pa.array(values, kind)]
                    )
            arrays = [columns[column.name].cast(column.type) for column in ROW_SCHEMA]
            writer.write_batch(pa.record_batch(arrays, schema=ROW_SCHEMA))
    return origins
