"""Gathers what `dstune data show` prints: some rows in pieces, and figures about all of them."""

from __future__ import annotations

import base64
import io
import json
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from dstune.config.convert import format_value
from dstune.config.schema import RunConfig
from dstune.core.errors import Problem, UserError
from dstune.core.paths import cache_root
from dstune.core.rank_env import RankEnv
from dstune.data import sources
from dstune.data.build import prepare
from dstune.data.collate import NO_TARGET
from dstune.data.images.places import COLUMN
from dstune.data.images.store import ImageFiles
from dstune.data.inputs import of_training
from dstune.data.prepared import PreparedData, Split
from dstune.data.statistics import longer_than, with_packing
from dstune.generation.answers import write_texts
from dstune.models.load import load_tokenizer
from dstune.protocols import task_of
from dstune.protocols.task_options import TrainsOnRollouts
from dstune.show.segments import Segment, Turn, joined_repeats, segments, turns

ALONE = RankEnv(0, 1, 0, 1, "alone")
COMPARED_SAMPLES = 1_000_000
"""Samples that are searched for repetitions; each takes 8 bytes, for its hash."""
MAX_REPETITIONS = 5
EXCERPT_CHARACTERS = 160
THUMBNAIL_PIXELS = 320
"""The longer edge of an image on the page."""


@dataclass(frozen=True)
class Beside:
    """A further text of a sample: the `positive` or a `negative` of a contrastive pair."""

    name: str
    segments: list[Segment]


@dataclass(frozen=True)
class Thumbnail:
    """A small copy of an image in a sample."""

    name: str
    """The image's path, or a note that it came inside the rows."""
    width: int
    height: int
    url: str
    """The small copy, as a data URL."""


@dataclass(frozen=True)
class Row:
    """One sample."""

    number: int
    """Its place in the split."""
    tokens: int
    targets: int | None
    """Number of trained tokens; None for a prompt whose answers the model writes itself."""
    label: str | None
    """The label that a classifier learns; for a judged answer, whether it is desirable."""
    source: str | None
    """Its source in a mixture."""
    segments: list[Segment]
    rejected: list[Segment] = field(default_factory=list)
    """The worse answer of a pair, from the token on at which it differs from the better one."""
    conversation: bool = False
    beside: list[Beside] = field(default_factory=list)
    """Further texts of the sample, which the model reads separately."""
    images: list[Thumbnail] = field(default_factory=list)
    """The images of the sample, in order."""

    @property
    def rejected_targets(self) -> int:
        return sum(segment.tokens for segment in self.rejected if segment.trained)

    @property
    def turns(self) -> list[Turn]:
        """The turns of a conversation: what the model reads, and what it has to write; empty for other samples."""
        return turns(self.segments)[0] if self.conversation else []

    @property
    def rest(self) -> list[Segment]:
        """What follows the last turn."""
        return turns(self.segments)[1]


@dataclass(frozen=True)
class Repeated:
    """Something that several samples have in common."""

    count: int
    text: str


@dataclass(frozen=True)
class Preview:
    """Rows of a split, and figures about all of its samples."""

    model: str
    task: str
    split: str
    samples: int
    rows: list[Row]
    report: dict[str, Any]
    """The split's entry of the data report; empty for a single row."""
    data: dict[str, Any]
    """Values of the section `data` that the figures are compared with: max_length, packing."""
    duplicates: list[Repeated] = field(default_factory=list)
    """Samples that occur more than once, the most frequent first."""
    note: str = ""
    """What the figures do not cover."""
    answers: list[Repeated] = field(default_factory=list)
    """Trained texts that occur in more than one sample, where the sample as a whole does not."""

    def to_json(self) -> dict[str, Any]:
        counted = {int(bound): rows for bound, rows in (self.report.get("lengths") or {}).items()}
        powers = [2**exponent for exponent in range(4, 41) if counted and 2**exponent < 2 * max(counted)]
        rows = [{**asdict(row), "turns": [turn.to_json() for turn in row.turns]} for row in self.rows]
        for row in rows:
            row["images"] = [{key: image[key] for key in ("name", "width", "height")} for image in row["images"]]
        return {
            **asdict(self),
            "rows": rows,
            "longer_than": {str(length): longer_than(counted, length) for length in powers},
        }


def show(config: RunConfig, split: str, count: int) -> Preview:
    """Return `count` evenly spaced samples of `split`, and figures about all of its samples.

    The prepared samples stay in the cache, where a run of the same configuration uses them.

    Raises:
        UserError: `prepare` refuses the data, or there is no such split.
    """
    tokenizer = load_tokenizer(config.model)
    data = prepare(config, tokenizer, ALONE, cache_root(), write=write_texts)
    part: Split | None = getattr(data, split)
    if part is None:
        fix = f"give data.{split}=FILE, or data.split.{split}=0.1 to hold rows out"
        raise UserError(Problem("--split", f"there are no {split} rows", fix, split))
    report = data.report
    if config.data.packing:
        report = with_packing(report, {split: part.lengths}, config.data.max_length)
    sample_count = len(part.lengths)
    chosen: list[int] = []
    if count:
        chosen = np.unique(np.linspace(0, sample_count - 1, min(count, sample_count)).round().astype(int)).tolist()
    samples, answers = repetitions(part, tokenizer, with_answers=task_of(config.task).language)
    return Preview(
        model=format_value(config.model.path),
        task=config.task.name,
        split=split,
        samples=sample_count,
        rows=[_row(config, data, part, tokenizer, number) for number in chosen],
        report=report[split],
        data={"max_length": config.data.max_length, "packing": config.data.packing},
        duplicates=samples,
        answers=answers,
        note="the first block of the stream" if config.data.streaming and split == "train" else "",
    )


def show_row(config: RunConfig, place: str) -> Preview:
    """Return the samples that the single row at `place` (FILE:LINE) becomes.

    Raises:
        UserError: there is no such row, or it is refused; the message names `place`.
    """
    name, _, line = place.rpartition(":")
    if not name or not line.isdigit():
        raise UserError(Problem("--row", "expected FILE:LINE", "--row my.jsonl:17", place))
    files = sources.expand(name, "--row")
    fields = _fields(files, int(line), place)
    config = _configuration_of(config, {file.path.resolve() for file in files})
    tokenizer = load_tokenizer(config.model)
    with tempfile.TemporaryDirectory(prefix="dstune-") as scratch:
        file = Path(scratch) / "row.jsonl"
        file.write_text(json.dumps(fields, default=_as_text) + "\n", encoding="utf-8")
        nothing_held_out = replace(config.data.split, validation=0.0, test=0.0)
        alone = replace(
            config.data,
            train=str(file),
            validation=None,
            test=None,
            mixture={},
            streaming=False,
            split=nothing_held_out,
            image_folder=config.data.image_folder or str(files[0].path.parent),
        )
        config = replace(config, data=alone)
        try:
            data = prepare(config, tokenizer, ALONE, Path(scratch), trains=False, write=write_texts)
        except UserError as error:
            renamed = [replace(problem, where=problem.where.replace(f"{file}:1", place)) for problem in error.problems]
            raise UserError(renamed) from None
        rows = [_row(config, data, data.train, tokenizer, number) for number in range(len(data.train.lengths))]
    values = {"max_length": config.data.max_length, "packing": config.data.packing}
    return Preview(format_value(config.model.path), config.task.name, place, len(rows), rows, {}, values)


def _as_text(value: Any) -> str:
    """Return a table's value that JSON does not have as text; bytes are an image, and become a data URL."""
    if isinstance(value, bytes):
        return f"data:image/png;base64,{base64.b64encode(value).decode()}"
    return str(value)


def _configuration_of(config: RunConfig, paths: set[Path]) -> RunConfig:
    """Return the configuration (task, format, columns) of the source in `data.mixture` that these files belong to; if they belong
    to none, the run's."""
    for key, source_config in of_training(config).values():
        try:
            files = sources.of_part(source_config.data, "train", key)
        except UserError:  # a missing source does not matter for this row
            continue
        if paths & {file.path.resolve() for file in files}:
            return source_config
    return config


def _fields(files: list[Any], line: int, place: str) -> dict[str, Any]:
    for raw in (raw for file in files for raw in sources.read(file)):
        if raw.line == line:
            if raw.fields is None:
                raise UserError(Problem(place, raw.error, "fix the row"))
            return raw.fields
    raise UserError(Problem("--row", "no row starts at this line", "give the first line of a row", place))


def _row(config: RunConfig, data: PreparedData, part: Split, tokenizer: Any, number: int) -> Row:
    sample = part.sample(number)
    source = None
    if part.sources is not None:
        source = list(config.data.mixture)[int(part.sources[number])]
    ids, trained = _tokens_and_labels(sample)
    is_prompt = isinstance(task_of(config.task), TrainsOnRollouts)
    return Row(
        number=number,
        tokens=int(part.lengths[number]),
        targets=None if is_prompt else _targets(sample, trained, part.weights[number]),
        label=_label_of(sample, data.labels),
        source=source,
        segments=joined_repeats(
            segments(tokenizer, ids, trained, data.labels if task_of(config.task).per_token else ())
        ),
        rejected=_rejected(sample, tokenizer),
        conversation=task_of(config.task).conversational and trained is not None,
        beside=_beside(sample, tokenizer),
        images=[_thumbnail(part.images, int(image)) for image in sample.get(COLUMN, ())] if part.images else [],
    )


def _thumbnail(files: ImageFiles, number: int) -> Thumbnail:
    line = files.line(number)
    small = files.image(number)
    small.thumbnail((THUMBNAIL_PIXELS, THUMBNAIL_PIXELS))
    stream = io.BytesIO()
    small.save(stream, "JPEG")
    url = f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode()}"
    return Thumbnail(line["path"] or "an image in the rows", line["width"], line["height"], url)


def _beside(sample: dict[str, Any], tokenizer: Any) -> list[Beside]:
    """Return the other texts of a contrastive pair."""
    if "positive_input_ids" not in sample:
        return []
    negatives = np.split(sample["negative_input_ids"], np.cumsum(sample["negative_lengths"])[:-1])
    texts = [("positive", sample["positive_input_ids"]), *(("negative", ids) for ids in negatives if len(ids))]
    return [Beside(name, segments(tokenizer, ids, None)) for name, ids in texts]


def _targets(sample: dict[str, Any], trained: np.ndarray | None, weight: float) -> int:
    """Return the number of trained tokens. It is the sample's weight, except for a pair and a judged answer, which weigh 1."""
    has_weight_one = "rejected_input_ids" in sample or "desirable" in sample
    return int(np.sum(trained != NO_TARGET)) if has_weight_one and trained is not None else int(weight)


def _rejected(sample: dict[str, Any], tokenizer: Any) -> list[Segment]:
    if "rejected_input_ids" not in sample:
        return []
    better, worse = sample["input_ids"], sample["rejected_input_ids"]
    shorter = min(len(better), len(worse))
    differs = better[:shorter] != worse[:shorter]
    start = int(np.argmax(differs)) if differs.any() else shorter
    labels = sample.get("rejected_labels")
    if labels is not None:
        start = min(start, int(np.argmax(labels != NO_TARGET)))
    return segments(tokenizer, worse[start:], None if labels is None else labels[start:])


def _token_labels(sample: dict[str, Any]) -> np.ndarray | None:
    """Return the label of each token, NO_TARGET for untrained ones. Of a question and its text, only the answer is trained."""
    if "start" not in sample:
        return sample.get("labels")
    labels = np.full(len(sample["input_ids"]), NO_TARGET)
    if sample["start"] != sample["null"]:
        labels[sample["start"] : sample["end"] + 1] = 0
    return labels


def _tokens_and_labels(sample: dict[str, Any]) -> tuple[Any, np.ndarray | None]:
    """Return the token ids and labels of a sample; for an encoder-decoder, the source followed by the target."""
    if "target_ids" not in sample:
        return sample["input_ids"], _token_labels(sample)
    source, target = sample["input_ids"], sample["target_ids"]
    return np.concatenate([source, target]), np.concatenate([np.full(len(source), NO_TARGET), target])


def _label_of(sample: dict[str, Any], labels: tuple[str, ...]) -> str | None:
    if "desirable" in sample:
        return "desirable" if sample["desirable"] else "undesirable"
    return _label(sample["label"], labels) if "label" in sample else None


def _label(value: Any, labels: tuple[str, ...]) -> str:
    if not labels:  # a regression
        return f"{float(value):g}"
    if np.ndim(value):  # several labels: 0 or 1 for each
        return ", ".join(label for label, set_ in zip(labels, value, strict=True) if set_) or "(none)"
    return labels[int(value)]


# ---- what occurs more than once ----


def repetitions(part: Split, tokenizer: Any, *, with_answers: bool) -> tuple[list[Repeated], list[Repeated]]:
    """Return the samples that occur most often, and the trained texts that occur most often in different samples.

    Compares the first COMPARED_SAMPLES by their hashes, and decodes only the few texts that are shown.
    """
    whole = np.empty(min(len(part.lengths), COMPARED_SAMPLES), np.uint64)
    trained = np.zeros(len(whole), np.uint64)
    further_columns = [name for name in part.table.column_names if name.endswith("_input_ids") or name == COLUMN]
    for number, (ids, labels) in enumerate(_arrays(part, len(whole), with_answers)):
        further = part.sample(number) if further_columns else {}
        content = b"".join(array.tobytes() for array in (ids, *(np.asarray(further[name]) for name in further_columns)))
        whole[number] = xxhash.xxh3_64_intdigest(content)
        if labels is not None:
            trained[number] = xxhash.xxh3_64_intdigest(labels[labels != NO_TARGET].tobytes())
    samples = [Repeated(count, _decoded(tokenizer, part, first)) for first, count in _frequent(whole)]
    if not trained.any():
        return samples, []
    # Copies of a sample also share its answer. Those are reported above, so each sample counts once here.
    _, once = np.unique(whole, return_index=True)
    once.sort()
    answers = [
        Repeated(count, _decoded(tokenizer, part, int(once[first]), trained=True))
        for first, count in _frequent(trained[once])
    ]
    return samples, answers


def _arrays(part: Split, count: int, with_labels: bool) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
    """Yield the token ids and labels of the first `count` samples, with one batch in memory at a time."""
    if "target_ids" in part.table.column_names:
        yield from (_tokens_and_labels(part.sample(number)) for number in range(count))
        return
    columns = list(("input_ids", "labels")[: 1 + with_labels])
    table = part.table.select(range(count)).select_columns(columns).with_format("arrow")
    for batch in table.iter(batch_size=1000):
        lists = [batch[name].combine_chunks() for name in columns]
        offsets = lists[0].offsets.to_numpy()
        values = [column.values.to_numpy() for column in lists]
        for start, end in pairwise(offsets):
            yield values[0][start:end], values[1][start:end] if len(values) > 1 else None


def _frequent(hashes: np.ndarray) -> list[tuple[int, int]]:
    """Return (index of the first occurrence, count) of the hashes that occur more than once, the most frequent first."""
    _, first, counts = np.unique(hashes, return_index=True, return_counts=True)
    order = np.lexsort((first, -counts))[:MAX_REPETITIONS]
    return [(int(first[at]), int(counts[at])) for at in order if counts[at] > 1]


def _decoded(tokenizer: Any, part: Split, number: int, *, trained: bool = False) -> str:
    ids, labels = _tokens_and_labels(part.sample(number))
    if trained and labels is not None:
        ids = ids[labels != NO_TARGET]
    text = " ".join(tokenizer.decode(ids[:EXCERPT_CHARACTERS], skip_special_tokens=True).split())
    return text if len(text) <= EXCERPT_CHARACTERS else f"{text[:EXCERPT_CHARACTERS]} ..."
