"""From the configured files to memory-mapped samples: read, check, split, tokenize, cache."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import tokenizers
import transformers
import xxhash

from dstune.config.data_schema import DataFormat
from dstune.config.schema import ChatConfig, ClassificationConfig, RunConfig
from dstune.data import cache, sources
from dstune.data.ingest import BadRows, Table, ingest
from dstune.data.prepared import PreparedData, SamplePrompt, Split
from dstune.data.prompts import sample_prompts
from dstune.data.render import freeze_date
from dstune.data.rows import check_columns, sort_labels
from dstune.data.split import TEST, TRAIN, VALIDATION, assign, lowest
from dstune.data.tokenize import RowTokenizer
from dstune.data.write import Counts, write_samples
from dstune.errors import Problem, UserError
from dstune.rank_env import RankEnv

__all__ = ["PreparedData", "SamplePrompt", "Split", "prepare"]

PARTS = ("train", "validation", "test")

log = logging.getLogger(__name__)

MIN_PROMPTS = 16
"""Prompts kept in the cache at least, so that a few more samples need no new entry."""


def prepare(config: RunConfig, tokenizer: Any, env: RankEnv, cache_root: Path) -> PreparedData:
    """The samples of `config` as `tokenizer` (of transformers, template applied) cuts them, memory-mapped.

    Every rank calls this. One process per node does the work under a file lock while the others wait without any
    collective; the result is found again by content, tokenizer, settings and code. Rows of validation and test come in
    the order of their hashes, so that the first N of them are a fair and constant sample.

    Raises UserError that names key or file and line.
    """
    check_columns(config.data.columns)
    files = _files(config)
    key = _fingerprint(config, tokenizer, files)
    folder = cache.entry(cache_root / "data", key, _Builder(config, tokenizer, files, env))
    return _load(folder, key)


def _files(config: RunConfig) -> dict[str, list[Path]]:
    if config.data.train is None:
        fix = "give a file, a glob, or a sample such as sample://chitchat"
        raise UserError(Problem(where="data.train", reason="no training data given", fix=fix))
    problems: list[Problem] = []
    files: dict[str, list[Path]] = {}
    for part in PARTS:
        spec = getattr(config.data, part)
        if spec is not None:
            try:
                files[part] = sources.expand(spec, f"data.{part}")
            except UserError as error:
                problems += error.problems
    if problems:
        raise UserError(problems)
    return files


def _fingerprint(config: RunConfig, tokenizer: Any, files: dict[str, list[Path]]) -> str:
    """Digest of all that the samples depend on."""
    data = config.data
    state = json.loads(tokenizer.backend_tokenizer.to_str()) if tokenizer.is_fast else tokenizer.get_vocab()
    # What the last call of the tokenizer left behind, not what it is.
    state.pop("truncation", None)
    state.pop("padding", None)
    template = json.dumps(tokenizer.chat_template, sort_keys=True)
    task = asdict(config.task)
    if isinstance(config.task, ChatConfig):
        # The date counts only if the template prints it.
        task.pop("template_date")
        template = freeze_date(template, config.task.template_date)
    parts = {
        "files": {part: [sources.fingerprint(file) for file in found] for part, found in files.items()},
        "tokenizer": [state, template, {key: str(value) for key, value in tokenizer.special_tokens_map.items()}],
        "task": task,
        "data": [data.format, data.columns, data.max_length, asdict(data.split), data.max_rows, data.on_bad_row],
        "prompts": _prompt_count(config),
        "code": [xxhash.xxh3_64_hexdigest(file.read_bytes()) for file in sorted(Path(__file__).parent.glob("*.py"))],
        "versions": [transformers.__version__, tokenizers.__version__],
    }
    text = json.dumps(
        parts, sort_keys=True, default=lambda value: value.name if isinstance(value, Enum) else str(value)
    )
    return xxhash.xxh3_128_hexdigest(text.encode("utf-8", "surrogatepass"))


def _prompt_count(config: RunConfig) -> int:
    return max(MIN_PROMPTS, config.evaluate.samples)


class _Builder:
    """Makes one cache entry; an object so that what the steps share has a name."""

    def __init__(self, config: RunConfig, tokenizer: Any, files: dict[str, list[Path]], env: RankEnv):
        self._config = config
        self._tokenizer = tokenizer
        self._files = files
        self._env = env

    def __call__(self, folder: Path) -> None:
        """Write `train.arrow`, `train.lengths.npy`, `train.weights.npy` (and those of the other parts), `meta.json`."""
        log.info("rank %d prepares the data for its node", self._env.rank)
        work = folder / "work"
        work.mkdir()
        config = self._config
        bad = BadRows(config.data.on_bad_row)
        tables = {part: ingest(files, config, work / f"{part}.rows.arrow", bad) for part, files in self._files.items()}
        bad.raise_if_any()
        _refuse_no_rows(tables, config)
        chosen = _choose(tables, config)
        labels = _labels(chosen, config, bad)
        bad.raise_if_any()
        if config.data.max_rows is not None:
            chosen["train"] = chosen["train"].keep(lowest(chosen["train"].hashes, config.data.max_rows))

        formats = {table.format for table in tables.values()}
        fmt = DataFormat.messages if DataFormat.messages in formats else tables["train"].format
        encode = RowTokenizer(self._tokenizer, config.task, fmt, config.data.max_length, labels)
        report: dict[str, Any] = {}
        with _no_progress_bars():
            for part, rows in chosen.items():
                counts = write_samples(
                    rows.table, rows.indices, encode, folder, part, bad, work=work, workers=config.data.workers
                )
                report[part] = _report(rows, counts)
        bad.raise_if_any()
        for part, counted in report.items():
            _refuse_no_samples(part, counted, config)
        prompts = []
        if "validation" in chosen and not isinstance(config.task, ClassificationConfig):
            rows, count = chosen["validation"], _prompt_count(config)
            prompts = sample_prompts(encode, rows.table, rows.indices, count, config.data.max_length)
        meta = {"labels": labels, "prompts": [asdict(prompt) for prompt in prompts], "report": report}
        (folder / "meta.json").write_text(json.dumps(meta))
        shutil.rmtree(work)


@dataclass(frozen=True)
class _Rows:
    """Some rows of a table."""

    table: Table
    indices: np.ndarray
    bad_rows: int = 0

    @property
    def hashes(self) -> np.ndarray:
        return self.table.hashes[self.indices]

    def keep(self, positions: np.ndarray, bad_rows: int = 0) -> _Rows:
        return _Rows(self.table, self.indices[positions], self.bad_rows + bad_rows)


def _choose(tables: dict[str, Table], config: RunConfig) -> dict[str, _Rows]:
    """Which rows make up each part: those of its own file, or those held out from the training file."""
    train, split = tables["train"], config.data.split
    parts = assign(
        train.hashes,
        train.labels,
        validation=0.0 if "validation" in tables else split.validation,
        test=0.0 if "test" in tables else split.test,
    )
    chosen = {"train": _Rows(train, np.flatnonzero(parts == TRAIN))}
    for part, number in (("validation", VALIDATION), ("test", TEST)):
        if part in tables:
            rows = _Rows(tables[part], np.arange(len(tables[part].hashes)))
        else:
            rows = _Rows(train, np.flatnonzero(parts == number))
        if len(rows.indices):
            # By hash, so that the first N rows are a fair sample and not, say, all of the first label.
            chosen[part] = rows.keep(np.argsort(rows.hashes, kind="stable"))
    return chosen


def _labels(chosen: dict[str, _Rows], config: RunConfig, bad: BadRows) -> tuple[str, ...]:
    """Label names by index; rows of the other parts with a label that training lacks are bad and left out."""
    if not isinstance(config.task, ClassificationConfig):
        return ()
    train = chosen["train"].table.labels
    assert train is not None
    labels = tuple(config.task.labels) or sort_labels(np.unique(train[chosen["train"].indices]).tolist())
    if len(labels) < 2:
        reason = f"the training rows have one label only ({labels[0]!r})"
        raise UserError(Problem(where="data.train", value=str(config.data.train), reason=reason))
    for part, rows in chosen.items():
        assert rows.table.labels is not None
        names = rows.table.labels[rows.indices]
        seen = np.isin(names, labels)
        for position in np.flatnonzero(~seen):
            place = rows.table.place(rows.indices[position])
            bad.add(place, f"label {str(names[position])!r} does not occur in the training rows ({', '.join(labels)})")
        chosen[part] = rows.keep(np.flatnonzero(seen), int((~seen).sum()))
        if not len(chosen[part].indices):
            bad.raise_if_any()
            raise UserError(Problem(where=f"data.{part}", reason="no row has a label that training knows"))
    return labels


def _refuse_no_rows(tables: dict[str, Table], config: RunConfig) -> None:
    problems = [
        Problem(
            where=f"data.{part}",
            value=str(getattr(config.data, part)),
            reason=f"no row is left: all {table.rows_read} are bad and were skipped",
            fix="data.on_bad_row=error shows what is wrong with them",
        )
        for part, table in tables.items()
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


def _report(rows: _Rows, counts: Counts) -> dict[str, Any]:
    """What happened to the rows of one part. Rows read and found bad on reading are those of its whole file."""
    bad_rows = rows.table.bad_rows + rows.bad_rows + counts.bad_rows
    return {"rows_read": rows.table.rows_read, "rows": len(rows.indices), **asdict(counts), "bad_rows": bad_rows}


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """`datasets` draws bars on stderr, where they would end up in the log of every rank."""
    shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


def _load(folder: Path, key: str) -> PreparedData:
    meta = json.loads((folder / "meta.json").read_text())
    parts = {part: _load_split(folder, part) for part in PARTS if part in meta["report"]}
    return PreparedData(
        train=parts["train"],
        validation=parts.get("validation"),
        test=parts.get("test"),
        labels=tuple(meta["labels"]),
        prompts=[SamplePrompt(**prompt) for prompt in meta["prompts"]],
        report=meta["report"],
        fingerprint=key,
    )


def _load_split(folder: Path, part: str) -> Split:
    table = datasets.Dataset.from_file(str(folder / f"{part}.arrow"))
    return Split(part, table, np.load(folder / f"{part}.lengths.npy"), np.load(folder / f"{part}.weights.npy"))
