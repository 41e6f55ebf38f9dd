"""The verb `dstune init DATA`: inspects the rows and the machine, and writes a configuration file to start from."""

from __future__ import annotations

import argparse
import json
import math
import re
import shlex
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count, islice
from pathlib import Path
from typing import Any

from dstune.config.compose import compose
from dstune.config.convert import format_value
from dstune.config.convert import literal as in_double_quotes
from dstune.config.names import sections
from dstune.config.overrides import key_of, parse
from dstune.config.plain_file import literal
from dstune.config.schema import RunConfig
from dstune.config.validate import validate
from dstune.core import files
from dstune.core.arguments import VerbParser
from dstune.core.errors import EXIT_DONE, Problem, UserError
from dstune.core.text import one_line
from dstune.data import sources
from dstune.data.formats import check_task, column_of, columns_read, recognise
from dstune.data.images.places import COLUMN
from dstune.data.rows import RowError, normalise
from dstune.launch import machine
from dstune.launch import plan as planner
from dstune.planning.fillers import rows_without_fillers
from dstune.planning.hardware import Cluster
from dstune.protocols import ROW_FORMATS, TASKS, task_of

EPILOG = """\
`key=value` after DATA is written into the file as well: `dstune init reviews.csv task=classification model=modernbert_base`.
`dstune init plugin KIND FILE.py` writes a working plugin (docs/plugins.md).
"""
READ_ROWS = 1000
"""The first rows of the data, by which columns and lengths are judged."""
MOST_LABELS = 100
"""The most different values of a column that is taken for labels."""
LONGEST_LABEL = 64
"""Characters."""
CHARACTERS_A_TOKEN = 3
"""English text has about 4 characters per token. The estimate is lower, since a row with too many tokens is cut."""
TEMPLATE_TOKENS = 128
"""Tokens that a chat template adds to a row, its own system message included."""
VISION_MODEL = "HuggingFaceTB/SmolVLM-256M-Instruct"
VISION_MODEL_ON_GPU = "Qwen/Qwen3-VL-2B-Instruct"
DECODERS = ("qwen3_8b", "qwen3_4b", "qwen3_1.7b", "qwen3_0.6b")
"""Models to choose from on a GPU, the largest first."""


@dataclass
class Rows:
    """The number of rows of the data, and what the first of them contain."""

    count: int
    place: str
    """`FILE:LINE` of the first row."""
    fields: Sequence[Mapping[str, Any]]
    """The content of the first rows, at most READ_ROWS."""
    longest: int
    """Characters of the longest of these rows."""
    usual: int
    """Characters that 99% of these rows do not exceed."""
    places: Sequence[str] = ()
    """`FILE:LINE` of each of `fields`."""
    unreadable: Sequence[str] = ()
    """`FILE:LINE: reason` of the first rows that cannot be read."""


@dataclass
class Line:
    """A setting of the file, with its reason as a comment."""

    key: str
    value: Any
    comment: str = ""


@dataclass(frozen=True)
class Reading:
    """A task that the rows may be for, and the settings with which it reads them."""

    lines: tuple[Line, ...]
    meaning: str
    """Its meaning in a few words, such as `'reply' answers 'mail'`."""

    def __str__(self) -> str:
        return f"task={self.lines[0].value}: {self.meaning}"

    def overrides(self) -> list[str]:
        """Return the settings for a command line, which need quotes for the shell alone."""
        values = (line.value for line in self.lines)
        texts = (_as_mapping(value) if isinstance(value, Mapping) else format_value(value) for value in values)
        return [f"{line.key}={text}" for line, text in zip(self.lines, texts, strict=True)]


def _as_mapping(columns: Mapping[str, str]) -> str:
    return "{" + ", ".join(f"{role}: {in_double_quotes(column)}" for role, column in columns.items()) + "}"


Choose = Callable[[Sequence[Reading]], Reading]
"""Returns the reading to take, of those that are possible; the likeliest is the first."""


@dataclass
class Starter:
    """The settings of the file."""

    lines: list[Line] = field(default_factory=list)
    other_readings: list[Reading] = field(default_factory=list)
    """What the rows may be for in place of the task that was chosen; empty if their columns leave no doubt."""

    def add(self, key: str, value: Any, comment: str = "") -> None:
        """Add a setting, unless it has been set already, as those of the user are."""
        if key not in {line.key for line in self.lines}:
            self.lines.append(Line(key, value, comment))

    def value(self, key: str) -> Any:
        return next((line.value for line in self.lines if line.key == key), None)

    def comment(self, key: str) -> str:
        return next((line.comment for line in self.lines if line.key == key), "")

    def overrides(self) -> list[str]:
        """Return the settings as overrides of a command line, choices of groups first."""
        ordered = sorted(self.lines, key=lambda line: "." in line.key)
        return [f"{line.key}={_literal(line)}" for line in ordered]


def _literal(line: Line) -> str:
    return str(line.value) if "." not in line.key else literal(line.value)


def main(argv: list[str]) -> int:
    """Run `dstune init DATA [key=value ...]`. Raises UserError; returns the exit code."""
    parser = VerbParser(
        prog="dstune init",
        usage="dstune init DATA [key=value ...] [--output my.yaml] [--force]",
        description="Look at your rows and this machine, and write a commented configuration file for `dstune train`.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("data", metavar="DATA", help="rows: anything that data.train accepts")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="settings that you have decided already")
    parser.add_argument("--output", type=Path, default=Path("my.yaml"), metavar="FILE", help="default my.yaml")
    parser.add_argument("--force", action="store_true", help="overwrite the file if it exists")
    arguments = parser.parse_intermixed_args(argv)
    check_output(arguments.output, arguments.force)
    rows = read_rows(arguments.data)
    in_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    choose = asked if in_terminal else likeliest
    starter, config, cluster = starter_for(arguments.data, rows, arguments.overrides, choose=choose)
    write(arguments.output, render(starter, ["dstune", "init", arguments.data], cluster))
    print(summary(starter, rows, config, arguments.output))
    if not in_terminal:
        print(*others_in_words(starter, arguments.data, arguments.overrides, arguments.output), sep="\n", end="")
    return EXIT_DONE


def check_output(path: Path, force: bool) -> None:
    """Raise UserError if the file cannot be written there, or exists already."""
    if path.suffix not in (".yaml", ".yml"):
        raise UserError(
            Problem("--output", "must end in .yaml or .yml", f"--output {path.with_suffix('.yaml')}", str(path))
        )
    if path.is_dir():
        raise UserError(Problem("--output", "is a folder", f"--output {path / 'my.yaml'}", str(path)))
    if path.exists() and not force:
        fix = f"--output {_unused_path(path)} writes another file, --force overwrites this one"
        raise UserError(Problem("--output", "exists already", fix, str(path)))


def write(path: Path, text: str) -> None:
    """Write the file. Raises UserError."""
    try:
        files.write(path, text)
    except OSError as error:
        fix = "give a file in a folder that you may write to"
        raise UserError(Problem("--output", f"cannot be written: {error.strerror}", fix, str(path))) from None


def _unused_path(path: Path) -> Path:
    """Return the first path like `path` that does not exist: my-2.yaml."""
    candidates = (path.with_stem(f"{path.stem}-{number}") for number in count(2))
    return next(candidate for candidate in candidates if not candidate.exists())


# ---- rows ----


def read_rows(data: str) -> Rows:
    """Read the first rows of `data`, and count all of them. Raises UserError if no row can be read."""
    data_files = sources.expand(data, "DATA")
    raw_rows = list(islice((row for file in data_files for row in sources.read(file)), READ_ROWS))
    fields = [row.fields for row in raw_rows if row.fields is not None]
    if not fields:
        reason = "none of its rows can be read" if raw_rows else "has no rows"
        raise UserError(Problem("DATA", reason, "give a file with one row per line", data))
    lengths = sorted(_count_characters(row) for row in fields)
    place = next(row.place for row in raw_rows if row.fields is not None)
    total = len(raw_rows) if len(raw_rows) < READ_ROWS else sum(map(sources.count, data_files))
    places = [row.place for row in raw_rows if row.fields is not None]
    unreadable = [f"{row.place}: {row.error}" for row in raw_rows if row.fields is None]
    return Rows(total, place, fields, lengths[-1], lengths[(len(lengths) - 1) * 99 // 100], places, unreadable)


def _count_characters(value: Any) -> int:
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Mapping):
        return sum(map(_count_characters, value.values()))
    return sum(map(_count_characters, value)) if isinstance(value, (list, tuple)) else 0


def recognise_task(rows: Rows, mapping: Mapping[str, str]) -> list[Reading]:
    """Return the tasks that may read the columns of the rows, the likeliest first; a single one if the columns leave no doubt.

    mapping: `data.columns`, the column for each role. Raises UserError if no task reads the columns.
    """
    columns = list(rows.fields[0])
    fitting_formats = [
        (name, row_format)
        for name, row_format in ROW_FORMATS.classes().items()
        if not row_format.only_named and _has_required_columns(row_format().expand(rows.fields[0]), row_format, mapping)
    ]
    fullest = max((len(row_format.required) for _, row_format in fitting_formats), default=0)
    # A prompt alone would leave its answer unread.
    if fullest < 2 and not mapping and (pair := _usual_pair(rows, columns)):
        return [pair]
    if not fitting_formats:
        return _guess_tasks(rows, columns)
    # The format with the most columns counts: a prompt, an answer and a label are feedback, not a conversation.
    name, row_format = max(fitting_formats, key=lambda entry: len(entry[1].required))
    task = next(task for task, cls in TASKS.classes().items() if name in cls(cls.Config()).formats)
    meaning = f"the columns are {', '.join(columns)}"
    further = (setting.partition("=") for setting in row_format.further_keys.split())
    verdicts = "rows with one answer and a verdict"
    lines = [Line("task", task, meaning), *(Line(key, value, verdicts) for key, _, value in further)]
    if task == "classification":
        lines += _label_settings(rows, column_of(row_format, "label", mapping, columns))
    return [Reading(tuple(lines), meaning)]


QUESTIONS = ("question", "instruction", "prompt", "query", "problem", "input", "user")
ANSWERS = ("answer", "response", "completion", "output", "reply", "solution", "assistant")
PAIRS: tuple[tuple[str, tuple[str, str], tuple[str, ...], tuple[str, ...]], ...] = (
    (
        "seq2seq",
        ("source", "target"),
        ("text", "document", "article", "dialogue"),
        ("summary", "highlights", "abstract"),
    ),
    ("embedding", ("anchor", "positive"), ("query", "question"), ("passage", "document", "positive_passage")),
    ("chat", ("prompt", "completion"), QUESTIONS, ANSWERS),
)
"""Tasks by the usual names of two columns with text: the task, the roles, and the names of each."""


def _usual_pair(rows: Rows, columns: list[str]) -> Reading | None:
    """Return the task of two columns with usual names; None if no two columns have them."""
    names = {column.lower(): column for column in columns if isinstance(rows.fields[0].get(column), str)}
    for task, roles, first_names, second_names in PAIRS:
        first = next((names[name] for name in first_names if name in names), None)
        second = next((names[name] for name in second_names if name in names), None)
        if first is not None and second is not None:
            meaning = f"{first!r} and {second!r}; the columns are {', '.join(columns)}"
            columns_of_roles = Line("data.columns", dict(zip(roles, (first, second), strict=True)))
            return Reading((Line("task", task, meaning), columns_of_roles), meaning)
    return None


def _has_required_columns(columns: Any, row_format: Any, mapping: Mapping[str, str]) -> bool:
    return all(column_of(row_format, role, mapping, columns) in columns for role in row_format.required)


def _label_settings(rows: Rows, column: str) -> Iterator[Line]:
    values = [value for row in rows.fields if (value := row.get(column)) is not None]
    if any(isinstance(value, list) for value in values):
        yield Line("task.multi_label", True, "a row has a list of labels")
    elif any(isinstance(value, float) and not value.is_integer() for value in values):
        yield Line("task.regression", True, "the labels are numbers")


def _guess_tasks(rows: Rows, columns: list[str]) -> list[Reading]:
    """Return the tasks that the values of unknown columns suggest, the likeliest first. Raises UserError if they suggest none."""
    texts = {
        column: [str(row[column]) for row in rows.fields if isinstance(row.get(column), (str, int, bool))]
        for column in columns
    }
    texts = {column: values for column, values in texts.items() if len(values) == len(rows.fields)}
    value_counts = {column: len(set(values)) for column, values in texts.items()}
    most_labels = min(MOST_LABELS, max(2, len(rows.fields) // 3))
    labels = [
        column
        for column, values in texts.items()
        if 2 <= value_counts[column] <= most_labels and max(map(len, values)) <= LONGEST_LABEL
    ]
    prose = sorted(
        (column for column, values in texts.items() if column not in labels and any(" " in value for value in values)),
        key=lambda column: -sum(map(len, texts[column])),
    )
    readings = []
    if len(prose) == 1:
        for label in sorted(labels, key=lambda column: value_counts[column]):
            meaning = f"{label!r} with {value_counts[label]} different values labels {prose[0]!r}"
            readings.append(_guess("classification", meaning, {"text": prose[0], "label": label}))
        only = "the only column with text" if not labels else "without the other columns"
        readings.append(_guess("causal_lm", f"{prose[0]!r} is plain text, {only}", {"text": prose[0]}))
    elif len(prose) == 2:
        first, second = sorted(prose, key=columns.index)
        for prompt, completion in ((first, second), (second, first)):
            readings.append(
                _guess("chat", f"{completion!r} answers {prompt!r}", {"prompt": prompt, "completion": completion})
            )
        readings.append(
            _guess("embedding", f"{first!r} and {second!r} belong together", {"anchor": first, "positive": second})
        )
    else:
        reason = f"no task reads the columns {', '.join(columns)}"
        fix = "dstune init DATA task=TASK 'data.columns={ROLE: COLUMN}'; docs/data.md has the roles of each task"
        raise UserError(Problem(rows.place, reason, fix))
    return readings


def _guess(task: str, meaning: str, columns: dict[str, str]) -> Reading:
    return Reading((Line("task", task, meaning), Line("data.columns", columns, "your column names")), meaning)


def likeliest(readings: Sequence[Reading]) -> Reading:
    return readings[0]


def asked(readings: Sequence[Reading]) -> Reading:
    """Return the reading that the user chooses in the terminal; the first one for an empty line or the end of the input."""
    if len(readings) == 1:
        return readings[0]
    print("The columns do not say what the rows are for:")
    for number, reading in enumerate(readings, start=1):
        print(f"  {number}  {one_line(str(reading))}")
    while True:
        print(f"Which one? [1-{len(readings)}, default 1] ", end="", flush=True)
        answer = sys.stdin.readline().strip()
        if not answer:
            return readings[0]
        if answer.isdecimal() and 1 <= int(answer) <= len(readings):
            return readings[int(answer) - 1]


# ---- the file ----


def starter_for(
    data: str,
    rows: Rows,
    overrides: Sequence[str],
    lines: Sequence[Line] = (),
    cluster: Cluster | None = None,
    choose: Choose = likeliest,
) -> tuple[Starter, RunConfig, Cluster]:
    """Return the settings for the rows and the hardware, their configuration, and the hardware.

    overrides: settings of the user. lines: settings where the user has none. cluster: the hardware; None for this machine. choose:
    called if the rows may be for several tasks.

    Raises:
        UserError: an override is wrong, or the rows do not suit the requested task.
    """
    parsed, problems = parse(overrides)
    if problems:
        raise UserError(problems)
    starter = Starter(
        [Line(key_of(text), override.value(), "yours") for text, override in zip(overrides, parsed, strict=True)]
    )
    if overrides:  # refuses wrong ones before anything is concluded from them
        compose([*overrides, "data.train=DATA"])
    for line in lines:
        starter.add(line.key, line.value, line.comment)
    mapping = {
        **(starter.value("data.columns") or {}),
        **{
            line.key.removeprefix("data.columns."): line.value
            for line in starter.lines
            if line.key.startswith("data.columns.")
        },
    }
    if starter.value("task") is None:
        readings = recognise_task(rows, mapping)
        reading = choose(readings)
        starter.other_readings = [other for other in readings if other is not reading]
        is_guess = choose is likeliest and len(readings) > 1
        for line in reading.lines:
            is_task = line.key == "task"
            starter.add(line.key, line.value, f"a guess: {line.comment}" if is_guess and is_task else line.comment)
    row_count = f"{rows.count:,} rows" if rows.count > 1 else "1 row"
    starter.add(
        "data.train",
        data,
        f"{row_count}; the longest of the first {len(rows.fields):,} has {rows.longest:,} characters",
    )
    config = compose(starter.overrides()).config
    first_row = normalise_first_row(config, rows)
    cluster = cluster or machine.here(config).cluster
    _add_lengths(starter, config, rows, cluster)
    if COLUMN in first_row and not starter.value("model"):
        comment = "the rows contain images: a vision-language model of the hub; docs/images.md lists others"
        starter.add("model.path", VISION_MODEL_ON_GPU if cluster.device.gpu else VISION_MODEL, comment)
    _add_model(starter, config, cluster)
    _add_name(starter, data)
    config = compose(starter.overrides()).config
    if rows_of_pass := rows_without_fillers(config, cluster.ranks):
        comment = f"rows of a pass: {cluster.ranks} devices share the {config.trainer.global_batch_size} rows of a step"
        starter.add("trainer.micro_batch_size", rows_of_pass, comment)
        config = compose(starter.overrides()).config
    validate(config)
    return starter, config, cluster


def normalise_first_row(config: RunConfig, rows: Rows) -> Mapping[str, Any]:
    """Return the first row as the task reads it. Raises UserError if the task cannot read it."""
    row = rows.fields[0]
    format_name = _format_of(row, config, rows.place)
    check_task(format_name, row, config.data.columns, config.data.format, config.task, rows.place)
    try:
        return normalise(row, format_name, config.data.columns, config.task)
    except RowError as error:
        raise UserError(Problem(rows.place, str(error), "fix the row, or add data.on_bad_row=skip")) from None


def _format_of(row: Mapping[str, Any], config: RunConfig, place: str) -> str:
    return recognise(row, config.data.columns, config.data.format, config.task, place)


def _add_lengths(starter: Starter, config: RunConfig, rows: Rows, cluster: Cluster) -> None:
    generates = task_of(config.task).generates
    longest_allowed = (4096 if cluster.device.gpu else 1024) if generates else 512
    tokens = max(64, rows.usual / CHARACTERS_A_TOKEN) + (TEMPLATE_TOKENS if generates else 0)
    max_length = min(longest_allowed, 2 ** math.ceil(math.log2(tokens)))
    starter.add("data.max_length", max_length, f"tokens; 99% of the rows have up to {rows.usual:,} characters")
    if generates and rows.count < 500:
        starter.add("data.packing", False, "packing so few rows would leave few steps")
    epochs = 3 if rows.count < 1000 else 2 if rows.count < 10_000 else 1
    starter.add("trainer.epochs", epochs, "passes over the rows; use fewer if the held-out loss rises")
    batch_size = 8 if rows.count < 500 else 16 if rows.count < 5000 else 32
    comment = "rows per step, on all devices together"
    if not task_of(config.task).comparable_loss:
        batch_size *= 4
        comment = "rows per step: each row is compared with the others, so larger batches teach more"
    starter.add("trainer.global_batch_size", batch_size, comment)


def _add_model(starter: Starter, config: RunConfig, cluster: Cluster) -> None:
    """Add model and method: on a GPU the largest model that fits without offloading, on a CPU a small one."""
    task = task_of(config.task)
    model_name = starter.value("model") or starter.value("model.path")
    if not (task.generates or config.task.name == "reward"):
        if not model_name:
            if cluster.device.gpu:
                starter.add("model", "modernbert_base", "a small encoder of 2024; sample://minilm is smaller still")
            else:
                starter.add(
                    "model", "minilm", "a small encoder that a CPU trains in minutes; with a GPU, modernbert_base"
                )
        starter.add("method", "full", "trains every weight; method=lora trains fewer")
        return
    if not model_name:
        largest = next(fitting_models(starter, cluster), None) if cluster.device.gpu else None
        if largest is None:
            starter.add(
                "model", "smollm2", "135M parameters, for a machine without a large GPU; or model: {path: OWNER/NAME}"
            )
        else:
            model, method = largest
            comment = f"the largest of {', '.join(reversed(DECODERS))} that fits; or model: {{path: OWNER/NAME}}"
            starter.add("model", model, comment)
            starter.add("method", method, "trains adapters on a frozen model" + " in 4 bits" * (method == "qlora"))
    starter.add("method", "lora", "trains adapters on a frozen model; method=full trains every weight")


def fitting_models(starter: Starter, cluster: Cluster) -> Iterator[tuple[str, str]]:
    """Yield the models of DECODERS that fit on the GPUs without offloading, and the method for each: those for LoRA, the largest
    first, then those that fit in 4 bits only."""
    methods = (starter.value("method"),) if starter.value("method") else ("lora", "qlora")
    fitting: set[str] = set()
    for method in methods:
        for model in DECODERS:
            if model in fitting:
                continue
            trial = Starter([*starter.lines])
            trial.add("model", model)
            trial.add("method", method)
            best = planner.planned(compose(trial.overrides()).config, cluster).plan.recommended
            if best is not None and best.offload == "none":
                fitting.add(model)
                yield model, method


def _add_name(starter: Starter, data: str) -> None:
    stem = re.sub(
        r"[^\w.-]+", "-", Path(data.partition(":")[0] if "://" not in data else data).name.split(".")[0]
    ).strip("-.")
    starter.add("run.name", stem or "mine", "runs are written to runs/NAME/DATE_TIME")


def render(starter: Starter, command: Sequence[str], cluster: Cluster) -> str:
    """Return the text of the file. command: the words of the command that writes it."""
    device = f"{cluster.per_node} x {cluster.device.name}"
    lines = [
        f"# Written by `{one_line(shlex.join(command))}` for {device} with {cluster.device.memory_gib:.1f} GiB each.",
        "# Values after the file override it: dstune train FILE trainer.epochs=1",
        "# Every key: dstune train --help KEY (for example optimizer.lr), docs/configuration.md",
    ]
    for section in [*dict.fromkeys(line.key.partition(".")[0] for line in sorted(starter.lines, key=_order))]:
        section_lines = [line for line in starter.lines if line.key.partition(".")[0] == section]
        choice = next((line for line in section_lines if line.key == section), None)
        if choice is not None and len(section_lines) == 1:
            lines.append(_line(section, choice))
            continue
        lines.append(f"{section}:")
        for line in section_lines:
            name = "name" if line is choice else line.key.partition(".")[2]
            lines.append(f"  {_line(name, line)}")
    if starter.value("optimizer.lr") is None:
        lines.append("# optimizer: {lr: 1e-4}  # default: the method's own learning rate")
    return "\n".join(lines) + "\n"


def _order(line: Line) -> int:
    names = ("experiment", *sections())
    section = line.key.partition(".")[0]
    return names.index(section) if section in names else len(names)


def _line(name: str, line: Line) -> str:
    plain = isinstance(line.value, str) and re.fullmatch(r"[A-Za-z][\w.+-]*(/[\w.+-]+)*", line.value, re.ASCII)
    words = ("null", "true", "false", "yes", "no", "on", "off", "y", "n")
    value = line.value if plain and str(line.value).lower() not in words else json.dumps(line.value, ensure_ascii=False)
    return f"{name}: {value}" + (f"  # {one_line(line.comment)}" if line.comment else "")


MOST_OF_ONE_LABEL = 0.9
"""Share of the rows with the same label above which a classifier may learn to say nothing else."""


def remarks(rows: Rows, config: RunConfig) -> Iterator[str]:
    """Yield what is wrong with the first rows, or left out of them, for the task: bad rows, columns that it does not read, missing
    labels, and one label that most rows have."""
    row_format = ROW_FORMATS[_format_of(rows.fields[0], config, rows.place)]
    bad = list(rows.unreadable)
    for row, place in zip(rows.fields, rows.places, strict=True):
        try:
            normalise(row, row_format.name, config.data.columns, config.task)
        except RowError as error:
            bad.append(f"{place}: {error}")
    first_rows = f"the first {len(rows.fields) + len(rows.unreadable):,}"
    if bad:
        yield f"{len(bad):,} of {first_rows} rows cannot be read; {bad[0]} (data.on_bad_row=skip leaves them out)"
    columns = list(dict.fromkeys(column for row in rows.fields for column in row))
    unread = [column for column in columns if column not in columns_read(row_format, config.data.columns, columns)]
    if unread and not row_format.keeps_columns:
        yield f"not read: {', '.join(unread)}"
    if "label" in row_format.required:
        column = column_of(row_format, "label", config.data.columns, columns)
        labels = [
            label for row in rows.fields if isinstance(label := row.get(column), (str, int, bool)) and label != ""
        ]
        missing = sum(row.get(column) in (None, "", []) for row in rows.fields)
        if missing:
            yield f"{missing:,} of {first_rows} rows have no {column}"
        if len(labels) > 1 and (most := Counter(labels).most_common(1)[0])[1] > MOST_OF_ONE_LABEL * len(labels):
            yield f"{most[1]:,} of {len(labels):,} rows have {column} {most[0]!r}: see task.balanced, and judge by f1 or mcc"


def others_in_words(starter: Starter, data: str, overrides: Sequence[str], output: Path) -> Iterator[str]:
    """Yield lines with what else the rows may be for, and the command that takes each."""
    if not starter.other_readings:
        return
    yield ""
    yield f"The task is a guess ({one_line(starter.comment('task')).removeprefix('a guess: ')}). The rows may be for another one:"
    for reading in starter.other_readings:
        words = ["dstune", "init", data, *overrides, *reading.overrides(), "--output", str(output), "--force"]
        yield f"  {shlex.join(words)}   # {one_line(reading.meaning)}"
    yield ""


def summary(starter: Starter, rows: Rows, config: RunConfig, output: Path) -> str:
    """Return what the command prints: the choices that it made, and the commands to run next."""
    choices = [f"{key}={starter.value(key)}" for key in ("task", "model", "model.path", "method") if starter.value(key)]
    file = shlex.quote(str(output))
    return "\n".join(
        [
            f"wrote {output}: {', '.join(choices)}, {rows.count:,} rows",
            *(f"  {remark}" for remark in remarks(rows, config)),
            "",
            f"  dstune data show {file}   # the rows as the model sees them",
            f"  dstune plan {file}        # memory and time",
            f"  dstune train {file}",
        ]
    )
