"""From the configured files to memory-mapped samples: read, check, split, tokenize, cache."""

from __future__ import annotations

import inspect
import json
import logging
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import tokenizers
import transformers
import xxhash

from dstune.config.architectures import is_encoder_decoder, marked_stops
from dstune.config.data_schema import OnSuspiciousLabels
from dstune.config.forgetting import mixes_in
from dstune.config.schema import RunConfig
from dstune.config.several_tasks import tasks_of
from dstune.core import plugins
from dstune.core.errors import Problem, UserError
from dstune.core.rank_env import RankEnv
from dstune.data import cache, mixture, sources
from dstune.data.augment import augmented
from dstune.data.augment.rewrite import identity
from dstune.data.augment.words import KEY as SYNONYMS_KEY
from dstune.data.chat import evidence
from dstune.data.chat.evidence import Proof
from dstune.data.clean.extras import versions
from dstune.data.clean.tables import Cleaning
from dstune.data.formats import check_mapped
from dstune.data.ingest import BadRows, Table, ingest
from dstune.data.inputs import PARTS, of_training
from dstune.data.label_names import refuse_suspicious
from dstune.data.labels import ChosenRows, class_weights, labels_of_training, rows_by_label
from dstune.data.parts import choose, leave_out_leaks, limited, of_task
from dstune.data.prepared import PreparedData, SamplePrompt, Split, StreamStart
from dstune.data.prompts import sample_prompts
from dstune.data.rows import check_columns
from dstune.data.stream import FileShard, Position, Stream, difference, identity_of
from dstune.data.swapped import load_swapped, write_swapped
from dstune.data.swaps import KEY as SWAPS_KEY
from dstune.data.swaps import Swaps
from dstune.data.template_date import freeze_date
from dstune.data.token_ids import check_tokenizer
from dstune.data.tokenize import RowTokenizer
from dstune.data.write import Counts, write_samples
from dstune.protocols import ROW_FORMATS, RowFormat, Task, task_of

__all__ = ["PreparedData", "SamplePrompt", "Split", "prepare", "prove"]


log = logging.getLogger(__name__)

HELD_OUT = "held_out.npy"

HEAD_START_SECONDS = 0.3
"""What a node's first rank is ahead of the others, so that it does the work: rank 0 shows how far it is."""

MIN_PROMPTS = 16
"""Prompts kept in the cache at least, so that a few more samples need no new entry."""


def prepare(config: RunConfig, tokenizer: Any, env: RankEnv, cache_root: Path, *, trains: bool = True) -> PreparedData:
    """The samples of `config` as `tokenizer` (of transformers, template applied) cuts them, memory-mapped.

    Every rank calls this. One process per node does the work under a file lock while the others wait without any
    collective; the result is found again by content, tokenizer, settings and code. Rows of validation and test come in
    the order of their hashes, so that the first N of them are a fair and constant sample.

    trains: whether `data.train` is what a run trains on, so that columns which are named in vain and suspicious labels count.
    Raises UserError that names key or file and line.
    """
    inputs = _inputs(config)
    check_tokenizer(config, tokenizer)
    key = _fingerprint(config, tokenizer, inputs)
    build = Builder(config, tokenizer, inputs, trains=trains)

    def make(folder: Path) -> None:
        log.info("preparing the rows")
        build(folder)

    if env.local_rank and not (cache_root / "data" / key).is_dir():
        time.sleep(HEAD_START_SECONDS)
    folder = cache.entry(cache_root / "data", key, make)
    data = _load(folder, key, config)
    if trains and config.data.on_suspicious_labels is OnSuspiciousLabels.error:
        refuse_suspicious(data.report["train"].get("labels", {}))
    return data


def prove(config: RunConfig, tokenizer: Any, data: PreparedData) -> Proof:
    """Compare conversations of every kind in `data.train` with what a server renders.

    Raises UserError with the first turn that is trained otherwise.
    """
    if data.evidence is None:
        return Proof()
    found = _proven(config, tokenizer, data.labels, data.train.table, data.evidence)
    counts = data.report.get("train", {})
    conversations, samples = counts.get("conversations", 0), counts.get("samples", 0)
    if not task_of(config.task).splits_conversations or samples <= conversations:
        return found
    grown = (
        f"{conversations:,} conversations make {samples:,} samples with {counts['tokens'] / counts['tokens_once']:.1f} times the "
        "tokens, since the chat template rewrites earlier turns (docs/chat-templates.md; task.turns=last trains one of each)"
    )
    return replace(found, note="; ".join(filter(None, [found.note, grown])))


def _proven(config: RunConfig, tokenizer: Any, labels: Sequence[str], table: datasets.Dataset, kept: Path) -> Proof:
    """The proof of the samples in `table`, of which the rows in `kept` are some. Raises UserError."""
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
    return evidence.prove(tokenizer, encode, table, kept)


@dataclass(frozen=True)
class Input:
    """What some rows are read from."""

    key: str
    """The configuration key that names it."""
    files: list[sources.DataFile]
    config: RunConfig
    """The run's configuration with the format and columns of these rows."""
    stream: Stream | None = None
    """With `data.streaming`, the training rows."""


Inputs = dict[str, dict[str, Input]]
"""By part, then by the name of the source, which is empty for all but a mixture's training rows."""


def _inputs(config: RunConfig) -> Inputs:
    if config.data.train is None and not config.data.mixture:
        fix = "give a file, a glob, or a sample such as sample://chitchat"
        raise UserError(Problem(where="data.train", reason="no training data given", fix=fix))
    problems: list[Problem] = []
    inputs: Inputs = {}
    expected = {"train": of_training(config)}
    expected |= {part: {"": (f"data.{part}", config)} for part in PARTS[1:]}
    for part, named in expected.items():
        for name, (key, own) in named.items():
            if getattr(own.data, part) is None:
                continue
            try:
                check_columns(own.data.columns)
                files = sources.of_part(own.data, part, key)
                streamed = own.data.streaming and part == "train"
                stream = Stream([FileShard(file) for file in files], own.trainer.seed) if streamed else None
                inputs.setdefault(part, {})[name] = Input(key, files, own, stream)
            except UserError as error:
                problems += error.problems
    if problems:
        raise UserError(problems)
    return inputs


def _fingerprint(config: RunConfig, tokenizer: Any, inputs: Inputs) -> str:
    """Digest of all that the samples depend on. The weights of a mixture are not among it: they decide the order."""
    data = config.data
    state = json.loads(tokenizer.backend_tokenizer.to_str()) if tokenizer.is_fast else tokenizer.get_vocab()
    # What the last call of the tokenizer left behind, not what it is.
    state.pop("truncation", None)
    state.pop("padding", None)
    template = json.dumps(tokenizer.chat_template, sort_keys=True)
    task = task_of(config.task)
    if task.conversational:  # the date counts only if the template prints it
        template = freeze_date(template, task.template_date)
    terms = config.evaluate.counterfactual
    swap_files = sources.expand(terms, SWAPS_KEY) if terms else []
    parts = {
        "files": {part: {name: _rows_digest(of) for name, of in named.items()} for part, named in inputs.items()},
        "replay": mixes_in(config),
        "mixture": [
            [name, of.format, of.columns, of.max_rows, of.task, of.prompt] for name, of in data.mixture.items()
        ],
        "tokenizer": [
            is_encoder_decoder(tokenizer),
            marked_stops(tokenizer),
            state,
            template,
            {key: str(value) for key, value in tokenizer.special_tokens_map.items()},
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
        ],
        "augment": _augment_digest(config),
        "prompts": _prompt_count(config),
        "evaluate": [config.evaluate.slices, [sources.fingerprint(of) for of in swap_files]],
        "clean": [asdict(data.clean), versions(data.clean)],
        "code": [xxhash.xxh3_64_hexdigest(file.read_bytes()) for file in _code(config)],
        "versions": [transformers.__version__, tokenizers.__version__],
    }
    if own := plugins.digests("task", "row format"):
        parts["plugins"] = own
    text = json.dumps(
        parts, sort_keys=True, default=lambda value: value.name if isinstance(value, Enum) else str(value)
    )
    return xxhash.xxh3_128_hexdigest(text.encode("utf-8", "surrogatepass"))


def _code(config: RunConfig) -> list[Path]:
    """Files whose code makes the samples: those of this package, and of the rooms of the run's tasks and their formats."""
    tasks = [task_of(task) for task in (config.task, *tasks_of(config).values())]
    classes = {type(task) for task in tasks} | {ROW_FORMATS[name] for task in tasks for name in task.formats}
    files = set(Path(__file__).parent.rglob("*.py"))
    for base in {base for cls in classes for base in cls.__mro__ if base not in (Task, RowFormat, object)}:
        file = Path(inspect.getfile(base))
        files |= set(file.parent.glob("*.py")) if file.name == "__init__.py" else {file}
    return sorted(files)


def _augment_digest(config: RunConfig) -> list[Any]:
    augment = config.data.augment
    if not augment.on:
        return []
    files = sources.expand(augment.synonyms, SYNONYMS_KEY) if augment.synonyms else []
    models = [identity(path) for path in augment.models]
    return [asdict(augment), [sources.fingerprint(file) for file in files], models]


def _rows_digest(source: Input) -> list[Any]:
    """What tells the rows of a source: the bytes of its files, or for a stream what its first block depends on."""
    if source.stream is None:
        return [sources.fingerprint(file) for file in source.files]
    return [source.stream.identity(), source.config.trainer.seed, source.config.data.stream_rows]


def block_builder(
    config: RunConfig, tokenizer: Any, begin: Position, held_out: np.ndarray, shards: list[list[str]]
) -> Builder:
    """Makes the samples of the block of the stream `data.train` that starts at `begin`.

    held_out: hashes of the rows that are left out, sorted uint64. shards: what the first block was read from
    (`StreamStart.shards`). Raises UserError where they are others now, since `begin` would mean other rows.
    """
    inputs = {"train": _inputs(config)["train"]}
    builder = Builder(config, tokenizer, inputs, begin=begin, held_out=held_out, shards=shards)
    builder.refuse_changed_shards()
    return builder


def _prompt_count(config: RunConfig) -> int:
    return max(MIN_PROMPTS, config.evaluate.samples)


class Builder:
    """Makes one cache entry; an object so that what the steps share has a name.

    begin: where the block of a stream starts. For all but its first block, held_out: hashes of rows to leave out, and
    shards: those of the first block.
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
        trains: bool = False,
    ):
        self._config = config
        self._tokenizer = tokenizer
        self._inputs = inputs
        self._begin = begin or Position()
        self._held_out = held_out
        self._shards = shards
        self._trains = trains

    def __call__(self, folder: Path) -> None:
        """Write `train.arrow`, `train.lengths.npy`, `train.weights.npy` (and those of the other parts), `meta.json`."""
        work = folder / "work"
        work.mkdir()
        config = self._config
        template = config.model.chat_template or f"that of {config.model.path}"
        bad = BadRows(config.data.on_bad_row, template)
        read = {part: self._read(part, work, bad) for part in self._inputs}
        bad.raise_if_any()
        if self._held_out is None:
            self._refuse_no_rows(read)
        for skipped in bad.first():
            log.warning("skipped %s: %s", skipped["place"], skipped["text"])
        cleaning = Cleaning(config, self._tokenizer, work)
        with _no_progress_bars():
            tables = {part: cleaning.rows(part, self._joined(part, named, work)) for part, named in read.items()}
        if self._held_out is None:
            cleaning.refuse_nothing_left(tables)
        chosen = self._choose(tables)
        leave_out_leaks(chosen, cleaning)
        labels = labels_of_training(chosen, config, bad)
        bad.raise_if_any()
        chosen["train"] = limited(chosen["train"], config)
        copied = self._augment(chosen, work)

        formats = {table.format for table in tables.values()}
        fmt = "messages" if "messages" in formats else tables["train"].format
        weights = class_weights(config, labels, chosen["train"])
        several = [(task, read["train"][name].format) for name, task in tasks_of(config).items()]
        encode = RowTokenizer(
            self._tokenizer,
            config.task,
            fmt,
            config.data.max_length,
            labels,
            weights,
            several=several,
            sources=tables["train"].sources,
        )
        report: dict[str, Any] = {}
        with _no_progress_bars():
            for part, rows in chosen.items():
                known = len(bad.first())
                counts = write_samples(
                    rows.table,
                    rows.indices,
                    encode,
                    folder,
                    part,
                    bad,
                    work=work,
                    workers=config.data.workers,
                    with_texts=part != "train" and _metrics_read_rows(config),
                )
                report[part] = _report(rows, counts, read.get(part, read["train"]), bad.first(known))
                if unread := _unread(read.get(part, {})):
                    report[part]["unread_columns"] = unread
                if by_label := rows_by_label(rows, config, labels):
                    report[part]["labels"] = by_label
                if part in cleaning.reports:
                    cleaned = cleaning.reports[part].to_dict()
                    cleaned["examples"] = report[part].get("examples", {}) | cleaned["examples"]
                    report[part] |= cleaned
                if part != "train" and config.evaluate.counterfactual:
                    swaps = Swaps.read(config.evaluate.counterfactual)
                    write_swapped(rows, swaps, encode, folder, part, work=work, workers=config.data.workers)
        if copied:
            report["train"]["augment"] = copied
        bad.raise_if_any()
        if self._held_out is None:
            for part, counted in report.items():
                _refuse_no_samples(part, counted, config)
        prompts = []
        if "validation" in chosen and task_of(config.task).generates:
            rows, count = chosen["validation"], _prompt_count(config)
            prompts = sample_prompts(encode, rows.table, rows.indices, count, config.data.max_length)
        meta = {
            "labels": labels,
            "class_weights": weights,
            "prompts": [asdict(prompt) for prompt in prompts],
            "report": report,
        }
        if config.data.streaming:
            meta["stream"] = self._finish_block(folder, chosen)
        (folder / "meta.json").write_text(json.dumps(meta))
        shutil.rmtree(work)
        kept = folder / evidence.FILE
        if self._held_out is not None and kept.is_file():  # the ranks prove the first block, before their first step
            _proven(config, self._tokenizer, labels, load_split(folder, "train").table, kept)

    def _read(self, part: str, work: Path, bad: BadRows) -> dict[str, Table]:
        read = {}
        for name, source in self._inputs[part].items():
            stream = source.stream
            rows = None if stream is None else stream.take(self._begin, source.config.data.stream_rows)
            read[name] = ingest(source.files, source.config, work / f"{part}.{name}.rows.arrow", bad, rows)
        if part == "train" and self._trains:
            self._refuse_unknown_columns(read)
        return read

    def _refuse_unknown_columns(self, read: dict[str, Table]) -> None:
        """Raises UserError where `data.columns` names a column that no training row has."""
        data = self._config.data
        everything = frozenset().union(*(table.columns for table in read.values()))
        check_mapped(everything, data.columns, str(next(iter(read.values())).files[0]))
        for name, table in read.items():
            if name in data.mixture:
                key = f"data.mixture.{name}.columns"
                check_mapped(table.columns, data.mixture[name].columns, str(table.files[0]), key)

    def _joined(self, part: str, named: dict[str, Table], work: Path) -> Table:
        return named[""] if "" in named else mixture.merge(named, self._config, work / f"{part}.rows.arrow")

    def _choose(self, tables: dict[str, Table]) -> dict[str, ChosenRows]:
        if self._held_out is None:
            return choose(tables, self._config)
        train = tables["train"]
        known = np.isin(train.hashes, self._held_out)
        if self._config.data.clean.leaks and train.text_keys is not None:
            known |= np.isin(train.text_keys, self._held_out)
        return {"train": ChosenRows(train, train.rows[~known[train.rows]])}

    def _augment(self, chosen: dict[str, ChosenRows], work: Path) -> dict[str, Any]:
        """Put copies behind the training rows, as `data.augment` says. Returns what to report."""
        if not self._config.data.augment.on:
            return {}
        train, held_out = chosen["train"], [rows for part, rows in chosen.items() if part != "train"]
        own = np.flatnonzero(of_task(train)) if mixes_in(self._config) else np.arange(len(train.indices))
        chosen["train"], reported = augmented(train, held_out, own, self._config, work)
        return reported

    def _finish_block(self, folder: Path, chosen: dict[str, ChosenRows]) -> dict[str, Any]:
        """Where the next block starts; the first block also leaves the hashes of what later ones have to leave out."""
        stream = self._inputs["train"][""].stream
        assert stream is not None
        shards = self.refuse_changed_shards()  # while it was read
        if self._held_out is None:
            hashes = [rows.hashes for part, rows in chosen.items() if part != "train"]
            if self._config.data.clean.leaks:
                hashes += [rows.text_keys for part, rows in chosen.items() if part != "train"]
            np.save(folder / HELD_OUT, np.unique(np.concatenate([np.empty(0, np.uint64), *hashes])))
        begun, passes = stream.share(self._begin), stream.share(stream.position)
        found = {"identity": identity_of(shards), "begun": begun, "passes": passes, "end": stream.position.to_dict()}
        return found | {"shards": shards} if self._held_out is None else found

    def refuse_changed_shards(self) -> list[list[str]]:
        """The shards as they are now. Raises UserError where they are not those of the first block."""
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
            for part, named in read.items()
            for name, table in named.items()
            if not len(table.hashes)
        ]
        if problems:
            raise UserError(problems)


def _metrics_read_rows(config: RunConfig) -> bool:
    """Whether metrics need the rows beside their samples."""
    return task_of(config.task).metrics_read_rows or bool(config.evaluate.slices)


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


def _report(rows: ChosenRows, counts: Counts, read: dict[str, Table], more: list[dict[str, str]]) -> dict[str, Any]:
    """What happened to the rows of one part. Rows read and found bad on reading are those of its whole file.

    more: the first rows in which tokenization found a fault.
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
    if skipped := [*(example for table in read.values() for example in table.bad_examples), *more]:
        report["examples"] = {"bad_rows": skipped}
    return report


def _unread(read: dict[str, Table]) -> dict[str, int]:
    """By column that looks like content and is not read, the rows of a part in which it holds something."""
    counted: Counter[str] = Counter()
    for table in read.values():
        counted.update(table.unread)
    return dict(counted)


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """`datasets` draws bars on stderr, where they would end up in the log of every rank."""
    formatted = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if formatted:
            datasets.enable_progress_bars()


def _load(folder: Path, key: str, config: RunConfig) -> PreparedData:
    meta = json.loads((folder / "meta.json").read_text())
    report = meta["report"]
    parts = {part: load_split(folder, part) for part in PARTS if part in report}
    if config.data.mixture:
        mixture.add_shares(report["train"]["sources"], config)
    return PreparedData(
        train=parts["train"],
        validation=parts.get("validation"),
        test=parts.get("test"),
        guard=parts.get("guard"),
        ood=parts.get("ood"),
        labels=tuple(meta["labels"]),
        prompts=[SamplePrompt(**prompt) for prompt in meta["prompts"]],
        report=report,
        swapped={part: found for part in PARTS[1:] if (found := load_swapped(folder, part, load_split))},
        fingerprint=key,
        evidence=file if (file := folder / evidence.FILE).is_file() else None,
        stream=StreamStart(folder / HELD_OUT, **meta["stream"]) if "stream" in meta else None,
    )


def load_split(folder: Path, part: str) -> Split:
    """The samples that were written to `folder`; nothing but their pages in use is in memory."""
    table = datasets.Dataset.from_file(str(folder / f"{part}.arrow"))
    lengths, weights = (np.load(folder / f"{part}.{name}.npy", mmap_mode="r") for name in ("lengths", "weights"))
    sources_file, origins_file, texts, places = (
        folder / f"{part}.{name}" for name in ("sources.npy", "origins.npy", "texts.arrow", "places.json")
    )
    return Split(
        part,
        table,
        lengths,
        weights,
        sources=np.load(sources_file, mmap_mode="r") if sources_file.exists() else None,
        origins=np.load(origins_file, mmap_mode="r") if origins_file.exists() else None,
        texts=datasets.Dataset.from_file(str(texts)) if texts.exists() else None,
        places=places if places.exists() else None,
        content=(folder / f"{part}.content").read_text(),
    )
