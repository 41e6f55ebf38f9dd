"""Build one cache entry of prepared samples: read, clean, select and tokenize the rows, and count what happened to them."""

from __future__ import annotations

import json
import logging
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from dstune.config.architectures import vision_of
from dstune.config.data_schema import OnBadRow
from dstune.config.forgetting import mixes_in
from dstune.config.multi_task import tasks_of
from dstune.config.schema import RunConfig
from dstune.core.errors import Problem, UserError
from dstune.data import mixture
from dstune.data.augment import augmented
from dstune.data.augment.rewrite import TextWriter
from dstune.data.bad_rows import BadRows, UnknownFormat
from dstune.data.chat import evidence
from dstune.data.chat.evidence import Proof
from dstune.data.clean.report import Report
from dstune.data.clean.tables import Cleaning
from dstune.data.formats import check_mapped, shape_of_all
from dstune.data.images.processor import refusal
from dstune.data.images.store import ImageFiles, ImageWriter
from dstune.data.ingest import Table, ingest
from dstune.data.labels import ChosenRows, class_weights, labels_of_training, rows_by_label
from dstune.data.parts import choose, leave_out_leaks, limited, of_task
from dstune.data.prepared import HELD_OUT, SamplePrompt, load_split
from dstune.data.prompts import prompt_count, sample_prompts
from dstune.data.row_sources import Inputs, find_inputs
from dstune.data.stream import Position, difference, identity_of
from dstune.data.swapped import write_swapped
from dstune.data.swaps import Swaps
from dstune.data.tokenize import RowTokenizer
from dstune.data.write import Counts, write_samples
from dstune.protocols import task_of

log = logging.getLogger(__name__)

ROWS_OF_BOTH_FAULTS = 10_000
"""With more rows than this, unreadable rows are reported before the others are tokenized, because tokenizing takes minutes."""


def block_builder(
    config: RunConfig,
    tokenizer: Any,
    begin: Position,
    held_out: np.ndarray,
    shards: list[list[str]],
    arguments: Mapping[str, Any],
) -> Builder:
    """Make the builder for the block of the stream `data.train` that starts at `begin`.

    held_out: hashes of the rows to leave out, sorted uint64. shards: those that the first block was read from
    (`StreamStart.shards`). arguments: the chat-template arguments that render all rows of the first block. Raises UserError if
    the shards have changed since, because `begin` would then mean other rows.
    """
    inputs = {"train": find_inputs(config)["train"]}
    builder = Builder(config, tokenizer, inputs, begin=begin, held_out=held_out, shards=shards, arguments=arguments)
    builder.refuse_changed_shards()
    return builder


class Builder:
    """Builds one cache entry. A class, so that the values shared by its steps have names.

    begin: where the block of a stream starts. The next three are given for every block but the first. held_out: hashes of
    rows to leave out. shards: those of the first block. arguments: the chat-template arguments that render the first block.
    """

    def __init__(
        self,
        config: RunConfig,
        tokenizer: Any,
        inputs: Inputs,
        *,
        begin: Position | None = None,
        held_out: np.ndarray | None = None,
        shards: list[list[str]] | None = None,
        arguments: Mapping[str, Any] | None = None,
        trains: bool = False,
        write: TextWriter | None = None,
    ):
        self._config = config
        self._tokenizer = tokenizer
        self._inputs = inputs
        self._begin = begin or Position()
        self._held_out = held_out
        self._shards = shards
        self._arguments = arguments
        self._trains, self._write_texts = trains, write
        self._images: ImageWriter | None = None

    def __call__(self, folder: Path) -> None:
        """Write `train.arrow`, `train.lengths.npy`, `train.weights.npy`, the same files for the other parts, and `meta.json`.

        Raises UserError. Bad rows take precedence over other errors: unreadable rows and, unless the files are large, rows that
        the chat template or the tokenizer refuses are reported together.
        """
        config = self._config
        bad = BadRows(config.data.on_bad_row, config.model.chat_template or f"that of {config.model.path}")
        try:
            self._write(folder, bad)
        except UnknownFormat:
            raise
        except UserError:
            bad.raise_if_any()  # they may have caused this error
            raise

    def _write(self, folder: Path, bad: BadRows) -> None:
        work = folder / "work"
        work.mkdir()
        config = self._config
        refused = refusal(vision_of(self._tokenizer), config.model.path)
        if config.data.streaming:  # a later block may have the first image
            refused = refused or "blocks of a stream take none (data.streaming=false)"
        self._images = ImageWriter(folder, config.data.image_folder, refused)
        read = self._read_all(work, bad)
        self._images.finish()
        cleaning = Cleaning(config, self._tokenizer, work)
        chosen, tables = self._clean_and_choose(read, cleaning, work)
        labels = labels_of_training(chosen, config, bad)
        chosen["train"] = limited(chosen["train"], config)
        augmentation = self._augment(chosen, work)
        weights = class_weights(config, labels, chosen["train"])
        encode = self._row_tokenizer(read["train"], tables, labels, weights)
        encode.use_images(ImageFiles.of(folder))
        report: dict[str, dict[str, Any]] = {}
        with _no_progress_bars():
            for part, rows in chosen.items():
                known_count = len(bad.first())
                counts = self._write_part(part, rows, encode, folder, bad)
                report[part] = _report(rows, counts, read.get(part, read["train"]), bad.first(known_count))
                report[part] |= _findings(
                    report[part], read.get(part, {}), rows_by_label(rows, config, labels), cleaning.reports.get(part)
                )
        if augmentation:
            report["train"]["augment"] = augmentation
        bad.raise_if_any()
        if self._held_out is None:
            for part, counted in report.items():
                _refuse_no_samples(part, counted, config)
        meta = {
            "labels": labels,
            "class_weights": weights,
            "prompts": [asdict(prompt) for prompt in self._prompts(chosen, encode)],
            "report": report,
        }
        if config.data.streaming:
            meta["stream"] = self._finish_block(folder, chosen)
        (folder / "meta.json").write_text(json.dumps(meta))
        shutil.rmtree(work)
        evidence_file = folder / evidence.FILE
        # The ranks prove the first block, before their first step.
        if self._held_out is not None and evidence_file.is_file():
            proof = prove_samples(config, self._tokenizer, labels, load_split(folder, "train").table, evidence_file)
            if proof.arguments != self._arguments:
                log.warning(
                    "the chat template renders the rows of this block with %s, and those of the first with %s, which an export "
                    "has built in: a server has to be given the others",
                    json.dumps(proof.arguments),
                    json.dumps(self._arguments),
                )

    def _read_all(self, work: Path, bad: BadRows) -> dict[str, dict[str, Table]]:
        """Return all tables by part, then by source. Raises UserError if no row is left, or early for bad rows of large files."""
        read = {part: self._read(part, work, bad) for part in self._inputs}
        if sum(table.rows_read for tables in read.values() for table in tables.values()) > ROWS_OF_BOTH_FAULTS:
            bad.raise_if_any()
        if self._held_out is None:
            self._refuse_no_rows(read)
        for skipped in bad.first() if self._config.data.on_bad_row is OnBadRow.skip else ():
            log.warning("skipped %s: %s", skipped["place"], skipped["text"])
        return read

    def _read(self, part: str, work: Path, bad: BadRows) -> dict[str, Table]:
        read = {}
        for name, source in self._inputs[part].items():
            stream = source.stream
            rows = None if stream is None else stream.take(self._begin, source.config.data.stream_rows)
            read[name] = ingest(
                source.files, source.config, work / f"{part}.{name}.rows.arrow", bad, rows, self._images
            )
        if part == "train" and self._trains:
            self._refuse_unknown_columns(read)
        return read

    def _refuse_unknown_columns(self, read: dict[str, Table]) -> None:
        """Check that every column named by `data.columns` occurs in the training rows. Raises UserError otherwise."""
        data = self._config.data
        everything = frozenset().union(*(table.columns for table in read.values()))
        check_mapped(everything, data.columns, str(next(iter(read.values())).files[0]))
        for name, table in read.items():
            if name in data.mixture:
                key = f"data.mixture.{name}.columns"
                check_mapped(table.columns, data.mixture[name].columns, str(table.files[0]), key)

    def _clean_and_choose(
        self, read: dict[str, dict[str, Table]], cleaning: Cleaning, work: Path
    ) -> tuple[dict[str, ChosenRows], dict[str, Table]]:
        """Return the chosen rows of each part, and the tables that hold them."""
        with _no_progress_bars():
            tables = {
                part: cleaning.rows(part, self._joined(part, tables_of_part, work))
                for part, tables_of_part in read.items()
            }
        if self._held_out is None:
            cleaning.refuse_nothing_left(tables)
        chosen = self._choose(tables)
        leave_out_leaks(chosen, cleaning)
        return chosen, tables

    def _joined(self, part: str, tables: dict[str, Table], work: Path) -> Table:
        return tables[""] if "" in tables else mixture.merge(tables, self._config, work / f"{part}.rows.arrow")

    def _choose(self, tables: dict[str, Table]) -> dict[str, ChosenRows]:
        if self._held_out is None:
            return choose(tables, self._config)
        train = tables["train"]
        is_held_out = np.isin(train.hashes, self._held_out)
        if self._config.data.clean.leaks and train.text_keys is not None:
            is_held_out |= np.isin(train.text_keys, self._held_out)
        return {"train": ChosenRows(train, train.rows[~is_held_out[train.rows]])}

    def _augment(self, chosen: dict[str, ChosenRows], work: Path) -> dict[str, Any]:
        """Append copies to the training rows as configured by `data.augment`. Returns its section of the report."""
        if not self._config.data.augment.on:
            return {}
        train, held_out = chosen["train"], [rows for part, rows in chosen.items() if part != "train"]
        copied_places = np.flatnonzero(of_task(train)) if mixes_in(self._config) else np.arange(len(train.indices))
        chosen["train"], augment_report = augmented(
            train, held_out, copied_places, self._config, work, self._write_texts
        )
        return augment_report

    def _row_tokenizer(
        self, read: dict[str, Table], tables: dict[str, Table], labels: tuple[str, ...], weights: tuple[float, ...]
    ) -> RowTokenizer:
        """Make the row tokenizer. read: the training tables by source."""
        return RowTokenizer(
            self._tokenizer,
            self._config.task,
            shape_of_all({table.format for table in tables.values()}, self._config.task),
            self._config.data.max_length,
            labels,
            weights,
            several=[(task, read[name].format) for name, task in tasks_of(self._config).items()],
            sources=tables["train"].sources,
        )

    def _write_part(self, part: str, rows: ChosenRows, encode: RowTokenizer, folder: Path, bad: BadRows) -> Counts:
        """Tokenize the rows into the files of `part`. For held-out parts also write the counterfactual rows with swapped terms."""
        config, work, held_out = self._config, folder / "work", part != "train"
        counts = write_samples(
            rows.table,
            rows.indices,
            encode,
            folder,
            part,
            bad,
            work=work,
            workers=config.data.workers,
            with_texts=held_out and (task_of(config.task).metrics_read_rows or bool(config.evaluate.slices)),
        )
        if held_out and config.evaluate.counterfactual:
            swaps = Swaps.read(config.evaluate.counterfactual)
            write_swapped(rows, swaps, encode, folder, part, work=work, workers=config.data.workers)
        return counts

    def _prompts(self, chosen: dict[str, ChosenRows], encode: RowTokenizer) -> list[SamplePrompt]:
        if "validation" not in chosen or not task_of(self._config.task).generates:
            return []
        rows = chosen["validation"]
        return sample_prompts(
            encode, rows.table, rows.indices, prompt_count(self._config), self._config.data.max_length
        )

    def _finish_block(self, folder: Path, chosen: dict[str, ChosenRows]) -> dict[str, Any]:
        """Return the record of this block, including where the next one starts. The first block also writes the hashes of the
        held-out rows, which later blocks must leave out."""
        stream = self._inputs["train"][""].stream
        assert stream is not None
        shards = self.refuse_changed_shards()  # they may have changed while the block was read
        if self._held_out is None:
            hashes = [rows.hashes for part, rows in chosen.items() if part != "train"]
            if self._config.data.clean.leaks:
                hashes += [rows.text_keys for part, rows in chosen.items() if part != "train"]
            np.save(folder / HELD_OUT, np.unique(np.concatenate([np.empty(0, np.uint64), *hashes])))
        begun, passes = stream.share(self._begin), stream.share(stream.position)
        record = {"identity": identity_of(shards), "begun": begun, "passes": passes, "end": stream.position.to_dict()}
        return record | {"shards": shards} if self._held_out is None else record

    def refuse_changed_shards(self) -> list[list[str]]:
        """Return the current shards. Raises UserError if they differ from those of the first block."""
        source = self._inputs["train"][""]
        assert source.stream is not None
        shards = source.stream.shards()
        if self._shards is not None and (changed := difference(self._shards, shards)):
            reason = f"the files of the stream changed while the run trains ({changed})"
            fix = "bring them back as they were and continue the run, or start another run with run.dir"
            raise UserError(Problem(source.key, reason, fix, str(self._config.data.train)))
        return shards

    def _refuse_no_rows(self, read: dict[str, dict[str, Table]]) -> None:
        problems = [
            Problem(
                where=self._inputs[part][name].key,
                value=str(getattr(self._inputs[part][name].config.data, part)),
                reason=f"no row is left: all {table.rows_read} are bad and were skipped",
                fix="data.on_bad_row=error shows what is wrong with them",
            )
            for part, tables in read.items()
            for name, table in tables.items()
            if not len(table.hashes)
        ]
        if problems:
            raise UserError(problems)


def _refuse_no_samples(part: str, counted: dict[str, Any], config: RunConfig) -> None:
    if counted["samples"]:
        return
    if counted["dropped"]:
        raise UserError(
            Problem(
                where="data.max_length",
                value=str(config.data.max_length),
                reason=f"no {part} row has a trainable token among its first {config.data.max_length} tokens: the rows "
                f"are {counted['shortest']} to {counted['longest']} tokens long",
                fix="raise data.max_length",
            )
        )
    reason = f"no {part} row is left: all are bad and were skipped"
    raise UserError(Problem(where=f"data.{part}", reason=reason, fix="data.on_bad_row=error shows what is wrong"))


def _report(
    rows: ChosenRows, counts: Counts, read: dict[str, Table], further_bad_rows: list[dict[str, str]]
) -> dict[str, Any]:
    """Return what happened to the rows of one part. Rows read and found bad on reading are those of its whole file.

    further_bad_rows: the first rows in which tokenization found a fault.
    """
    bad_rows = rows.table.bad_rows + rows.bad_rows + counts.bad_rows
    counted = asdict(counts)
    by_source = counted.pop("by_source")
    report = {"rows_read": rows.table.rows_read, "rows": len(rows.indices), **counted, "bad_rows": bad_rows}
    if rows.table.sources is not None:
        used = np.bincount(rows.table.sources[rows.indices], minlength=len(read))
        report["sources"] = {
            name: {
                "rows_read": table.rows_read,
                "bad_rows": table.bad_rows,
                "rows": int(used[number]),
                # Where rows were made up from those that are left, a last source without any has no number.
                **(by_source[number] if number < len(by_source) else {"samples": 0, "tokens": 0, "targets": 0}),
            }
            for number, (name, table) in enumerate(read.items())
        }
    if skipped := [*(example for table in read.values() for example in table.bad_examples), *further_bad_rows]:
        report["examples"] = {"bad_rows": skipped}
    return report


def _findings(
    report: dict[str, Any], read: dict[str, Table], by_label: dict[str, int], cleaned: Report | None
) -> dict[str, Any]:
    """Return the fields that complete the `report` of one part: unread columns that look like content, the number of synthetic
    rows, rows by label, and what cleaning did.

    read: the part's tables by source; empty if the part has no files of its own.
    """
    findings: dict[str, Any] = {}
    if unread := _unread(read):
        findings["unread_columns"] = unread
    if synthetic := sum(table.synthetic_rows for table in read.values()):
        findings["synthetic_rows"] = synthetic
    if by_label:
        findings["labels"] = by_label
    if cleaned is not None:
        findings |= cleaned.to_dict()
        findings["examples"] = report.get("examples", {}) | findings["examples"]
    return findings


def _unread(read: dict[str, Table]) -> dict[str, int]:
    """Count, by column, the rows of a part with a value in an unread column that looks like content."""
    counted: Counter[str] = Counter()
    for table in read.values():
        counted.update(table.unread)
    return dict(counted)


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Switch off the progress bars of `datasets`: it draws them on stderr, so they would fill the log of every rank."""
    was_enabled = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if was_enabled:
            datasets.enable_progress_bars()


def prove_samples(
    config: RunConfig,
    tokenizer: Any,
    labels: Sequence[str],
    table: datasets.Dataset,
    evidence_file: Path,
    images: ImageFiles | None = None,
) -> Proof:
    """Prove the samples in `table` with the rows in `evidence_file`, the source of some of them. Raises UserError if that fails."""
    if not tokenizer.chat_template:
        return Proof()
    formats = ["messages"] * len(tasks_of(config))
    several = list(zip(tasks_of(config).values(), formats, strict=True))
    encode = RowTokenizer(
        tokenizer,
        config.task,
        "messages",
        config.data.max_length,
        tuple(labels),
        several=several,
        sources=np.zeros(0, np.int16),  # `prove` takes each row's own tokenizer by its source
    )
    encode.use_images(images)
    return evidence.prove(tokenizer, encode, table, evidence_file)
