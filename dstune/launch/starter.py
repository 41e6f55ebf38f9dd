"""The verb `dstune init DATA`: looks at rows and machine, and writes a configuration file to begin from."""

from __future__ import annotations

import argparse
import json
import math
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count, islice
from pathlib import Path
from typing import Any

from dstune.config.compose import compose
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
from dstune.data.formats import check_task, column_of, recognise
from dstune.data.images.places import COLUMN
from dstune.data.rows import RowError, normalise
from dstune.launch import machine
from dstune.launch import plan as planner
from dstune.planning.hardware import Cluster
from dstune.protocols import ROW_FORMATS, TASKS, task_of

EPILOG = """\
`key=value` behind DATA is written into the file as well: `dstune init reviews.csv task=classification model=modernbert_base`.
`dstune init plugin KIND FILE.py` writes a plugin that works (docs/plugins.md).
"""
READ_ROWS = 1000
"""At the beginning of the data: what columns and lengths are judged by."""
MOST_LABELS = 100
LONGEST_LABEL = 64
CHARACTERS_A_TOKEN = 3
"""Of English text a token has 4; too long a row is cut, so the guess is a careful one."""
TEMPLATE_TOKENS = 128
"""Of a chat template, with a system message of its own."""
SEEING = "HuggingFaceTB/SmolVLM-256M-Instruct"
SEEING_ON_GPU = "Qwen/Qwen3-VL-2B-Instruct"
DECODERS = ("qwen3_8b", "qwen3_4b", "qwen3_1.7b", "qwen3_0.6b")
"""What a GPU may train, the largest first."""


@dataclass
class Rows:
    """What the first rows of the data show."""

    count: int
    place: str
    """`FILE:LINE` of the first one."""
    fields: Sequence[Mapping[str, Any]]
    longest: int
    """Characters of the longest one of them, and of all but the longest hundredth."""
    usual: int


@dataclass
class Line:
    """One setting of the file, with the reason."""

    key: str
    value: Any
    comment: str = ""


@dataclass
class Starter:
    lines: list[Line] = field(default_factory=list)

    def add(self, key: str, value: Any, comment: str = "") -> None:
        """Add a setting, unless the user has given it."""
        if key not in {line.key for line in self.lines}:
            self.lines.append(Line(key, value, comment))

    def value(self, key: str) -> Any:
        return next((line.value for line in self.lines if line.key == key), None)

    def overrides(self) -> list[str]:
        """Return the settings as the command line would have them, choices of groups first."""
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
    parser.add_argument("data", metavar="DATA", help="rows: whatever data.train takes")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="settings that you know already")
    parser.add_argument("--output", type=Path, default=Path("my.yaml"), metavar="FILE", help="default my.yaml")
    parser.add_argument("--force", action="store_true", help="replace the file")
    arguments = parser.parse_intermixed_args(argv)
    _check_output(arguments.output, arguments.force)
    rows = read_rows(arguments.data)
    starter, config, cluster = starter_for(arguments.data, rows, arguments.overrides)
    text = render(starter, arguments.data, cluster)
    try:
        files.write(arguments.output, text)
    except OSError as error:
        fix = "give a file in a folder of yours"
        raise UserError(
            Problem("--output", f"cannot be written: {error.strerror}", fix, str(arguments.output))
        ) from None
    print(summary(starter, rows, config, arguments.output))
    return EXIT_DONE


def _check_output(path: Path, force: bool) -> None:
    if path.suffix not in (".yaml", ".yml"):
        raise UserError(
            Problem("--output", "is no name of a YAML file", f"--output {path.with_suffix('.yaml')}", str(path))
        )
    if path.is_dir():
        raise UserError(Problem("--output", "is a folder", f"--output {path / 'my.yaml'}", str(path)))
    if path.exists() and not force:
        fix = f"--output {_unused(path)} writes another one, --force replaces it"
        raise UserError(Problem("--output", "exists already", fix, str(path)))


def _unused(path: Path) -> Path:
    """Return the first name like `path` that no file has: my-2.yaml."""
    names = (path.with_stem(f"{path.stem}-{number}") for number in count(2))
    return next(name for name in names if not name.exists())


# ---- rows ----


def read_rows(data: str) -> Rows:
    """Read the first rows of `data`, and count all. Raises UserError where there are none."""
    files = sources.expand(data, "DATA")
    raw = list(islice((row for file in files for row in sources.read(file)), READ_ROWS))
    fields = [row.fields for row in raw if row.fields is not None]
    if not fields:
        reason = "has no rows that can be read" if raw else "has no rows"
        raise UserError(Problem("DATA", reason, "give a file with a row a line", data))
    lengths = sorted(_characters(row) for row in fields)
    place = next(row.place for row in raw if row.fields is not None)
    total = len(raw) if len(raw) < READ_ROWS else sum(map(sources.count, files))
    return Rows(total, place, fields, lengths[-1], lengths[(len(lengths) - 1) * 99 // 100])


def _characters(value: Any) -> int:
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Mapping):
        return sum(map(_characters, value.values()))
    return sum(map(_characters, value)) if isinstance(value, (list, tuple)) else 0


def recognised_task(rows: Rows, mapping: Mapping[str, str]) -> Iterator[Line]:
    """Yield the task that reads these columns, and how its rows are to be read.

    Raises:
        UserError: no task reads them.
    """
    columns = list(rows.fields[0])
    fitting = [
        (name, form)
        for name, form in ROW_FORMATS.classes().items()
        if not form.only_named and _reads(form().expand(rows.fields[0]), form, mapping)
    ]
    if fitting:
        # The most columns: a prompt, an answer and a label are feedback, not a conversation.
        name, form = max(fitting, key=lambda entry: len(entry[1].required))
        task = next(task for task, cls in TASKS.classes().items() if name in cls(cls.Config()).formats)
        yield Line("task", task, f"the columns are {', '.join(columns)}")
        for setting in form.further_keys.split():
            yield Line(setting.partition("=")[0], setting.partition("=")[2], "rows with one answer and a verdict")
        if task == "classification":
            yield from _labels(rows, column_of(form, "label", mapping, columns))
        return
    yield from _guessed_task(rows, columns)


def _reads(columns: Any, form: Any, mapping: Mapping[str, str]) -> bool:
    return all(column_of(form, role, mapping, columns) in columns for role in form.required)


def _labels(rows: Rows, column: str) -> Iterator[Line]:
    values = [value for row in rows.fields if (value := row.get(column)) is not None]
    if any(isinstance(value, list) for value in values):
        yield Line("task.multi_label", True, "a row has a list of labels")
    elif any(isinstance(value, float) and not value.is_integer() for value in values):
        yield Line("task.regression", True, "the labels are numbers")


def _guessed_task(rows: Rows, columns: list[str]) -> Iterator[Line]:
    """Yield the task of a table whose columns have names of their own. Raises UserError where nothing suggests one."""
    texts = {
        column: [str(row[column]) for row in rows.fields if isinstance(row.get(column), (str, int, bool))]
        for column in columns
    }
    texts = {column: values for column, values in texts.items() if len(values) == len(rows.fields)}
    different = {column: len(set(values)) for column, values in texts.items()}
    most = min(MOST_LABELS, max(2, len(rows.fields) // 3))
    labels = [
        column
        for column, values in texts.items()
        if 2 <= different[column] <= most and max(map(len, values)) <= LONGEST_LABEL
    ]
    prose = sorted(
        (column for column, values in texts.items() if column not in labels and any(" " in value for value in values)),
        key=lambda column: -sum(map(len, texts[column])),
    )
    if len(prose) == 1 and labels:
        label = min(labels, key=lambda column: different[column])
        yield Line("task", "classification", f"a guess: {different[label]} values of {label!r} beside a text")
        yield Line("data.columns", {"text": prose[0], "label": label}, "your names of the columns")
    elif len(prose) == 2:
        prompt, completion = sorted(prose, key=columns.index)
        yield Line("task", "chat", f"a guess: {completion!r} answers {prompt!r}")
        yield Line("data.columns", {"prompt": prompt, "completion": completion}, "your names of the columns")
    elif len(prose) == 1:
        yield Line("task", "causal_lm", "a guess: the only text")
        yield Line("data.columns", {"text": prose[0]}, "your name of the column")
    else:
        reason = f"no task reads the columns {', '.join(columns)}"
        fix = "dstune init DATA task=TASK 'data.columns={ROLE: COLUMN}'; docs/data.md has the roles of each task"
        raise UserError(Problem(rows.place, reason, fix))


# ---- the file ----


def starter_for(data: str, rows: Rows, overrides: Sequence[str]) -> tuple[Starter, RunConfig, Cluster]:
    """Return the settings for rows and machine, with their configuration.

    Raises:
        UserError: an override is wrong, or the rows do not suit the task that is asked for.
    """
    parsed, problems = parse(overrides)
    if problems:
        raise UserError(problems)
    starter = Starter(
        [Line(key_of(text), override.value(), "yours") for text, override in zip(overrides, parsed, strict=True)]
    )
    if overrides:  # whatever is wrong with them, before anything is concluded from them
        compose([*overrides, "data.train=DATA"])
    mapping = {
        **(starter.value("data.columns") or {}),
        **{
            line.key.removeprefix("data.columns."): line.value
            for line in starter.lines
            if line.key.startswith("data.columns.")
        },
    }
    if starter.value("task") is None:
        for line in recognised_task(rows, mapping):
            starter.add(line.key, line.value, line.comment)
    number = f"{rows.count:,} rows" if rows.count > 1 else "1 row"
    starter.add(
        "data.train", data, f"{number}; the longest of the first {len(rows.fields):,} has {rows.longest:,} characters"
    )
    config = compose(starter.overrides()).config
    first = checked_row(config, rows)
    cluster = machine.here(config).cluster
    _add_lengths(starter, config, rows, cluster)
    if COLUMN in first and not starter.value("model"):
        sees = "the rows hold images: a model of the hub that sees; docs/images.md names others"
        starter.add("model.path", SEEING_ON_GPU if cluster.device.gpu else SEEING, sees)
    _add_model(starter, config, cluster)
    _add_name(starter, data)
    config = compose(starter.overrides()).config
    validate(config)
    return starter, config, cluster


def checked_row(config: RunConfig, rows: Rows) -> Mapping[str, Any]:
    """Return the first row as the task reads it. Raises UserError where it does not suit the task."""
    first = rows.fields[0]
    name = recognise(first, config.data.columns, config.data.format, config.task, rows.place)
    check_task(name, first, config.data.columns, config.data.format, config.task, rows.place)
    try:
        return normalise(first, name, config.data.columns, config.task)
    except RowError as error:
        raise UserError(Problem(rows.place, str(error), "fix the row, or add data.on_bad_row=skip")) from None


def _add_lengths(starter: Starter, config: RunConfig, rows: Rows, cluster: Cluster) -> None:
    generates = task_of(config.task).generates
    most = (4096 if cluster.device.gpu else 1024) if generates else 512
    tokens = max(64, rows.usual / CHARACTERS_A_TOKEN) + (TEMPLATE_TOKENS if generates else 0)
    length = min(most, 2 ** math.ceil(math.log2(tokens)))
    starter.add("data.max_length", length, f"tokens; 99% of the rows have up to {rows.usual:,} characters")
    if generates and rows.count < 500:
        starter.add("data.packing", False, "with few rows, packed ones would leave few steps")
    epochs = 3 if rows.count < 1000 else 2 if rows.count < 10_000 else 1
    starter.add("trainer.epochs", epochs, "passes over the rows; fewer if the held-out loss rises")
    batch = 8 if rows.count < 500 else 16 if rows.count < 5000 else 32
    comment = "rows of a step, on all devices together"
    if not task_of(config.task).comparable_loss:
        batch, comment = batch * 4, "rows of a step: each is compared with the others, so more of them teach more"
    starter.add("trainer.global_batch_size", batch, comment)


def _add_model(starter: Starter, config: RunConfig, cluster: Cluster) -> None:
    """Add model and method: the largest that fits with ease, and the smallest where there is no GPU."""
    task = task_of(config.task)
    model_name = starter.value("model") or starter.value("model.path")
    if not (task.generates or config.task.name == "reward"):
        if not model_name:
            on_gpu = "a small encoder of 2024; sample://minilm is smaller still"
            small = "a small encoder that a CPU trains in minutes; with a GPU modernbert_base"
            starter.add("model", *(("modernbert_base", on_gpu) if cluster.device.gpu else ("minilm", small)))
        starter.add("method", "full", "every weight; method=lora trains fewer")
        return
    if not model_name:
        fitting = _largest(starter, cluster) if cluster.device.gpu else None
        if fitting is None:
            starter.add(
                "model", "smollm2", "135M parameters, for a machine without a large GPU; or model: {path: OWNER/NAME}"
            )
        else:
            size = f"the largest of {', '.join(reversed(DECODERS))} that fits; or model: {{path: OWNER/NAME}}"
            starter.add("model", fitting[0], size)
            starter.add(
                "method", fitting[1], "trains adapters on a frozen model" + " in 4 bits" * (fitting[1] == "qlora")
            )
    starter.add("method", "lora", "trains adapters on a frozen model; method=full trains every weight")


def _largest(starter: Starter, cluster: Cluster) -> tuple[str, str] | None:
    """Return the largest model that the plan puts onto the GPUs of this machine, and the method for it."""
    methods = (starter.value("method"),) if starter.value("method") else ("lora", "qlora")
    for method in methods:
        for model in DECODERS:
            trial = Starter([*starter.lines])
            trial.add("model", model)
            trial.add("method", method)
            best = planner.planned(compose(trial.overrides()).config, cluster).plan.recommended
            if best is not None and best.offload == "none":
                return model, method
    return None


def _add_name(starter: Starter, data: str) -> None:
    stem = re.sub(
        r"[^\w.-]+", "-", Path(data.partition(":")[0] if "://" not in data else data).name.split(".")[0]
    ).strip("-.")
    starter.add("run.name", stem or "mine", "runs are written to runs/NAME/DATE_TIME")


def render(starter: Starter, data: str, cluster: Cluster) -> str:
    """Return the text of the file."""
    device = f"{cluster.per_node} x {cluster.device.name}"
    lines = [
        f"# Written by `dstune init {one_line(shlex.quote(data))}` on {device} with {cluster.device.memory_gib:.1f} GiB each.",
        "# Values behind the file win: dstune train FILE trainer.epochs=1",
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
    rate = (
        ""
        if starter.value("optimizer.lr") is not None
        else "# optimizer: {lr: 1e-4}  # the method's own rate if not given\n"
    )
    return "\n".join(lines) + "\n" + rate


def _order(line: Line) -> int:
    names = ("experiment", *sections())
    section = line.key.partition(".")[0]
    return names.index(section) if section in names else len(names)


def _line(name: str, line: Line) -> str:
    plain = isinstance(line.value, str) and re.fullmatch(r"[A-Za-z][\w.+-]*(/[\w.+-]+)*", line.value, re.ASCII)
    words = ("null", "true", "false", "yes", "no", "on", "off", "y", "n")
    value = line.value if plain and str(line.value).lower() not in words else json.dumps(line.value, ensure_ascii=False)
    return f"{name}: {value}" + (f"  # {one_line(line.comment)}" if line.comment else "")


def summary(starter: Starter, rows: Rows, config: RunConfig, output: Path) -> str:
    """Return what was found, and the commands to go on with."""
    choices = [f"{key}={starter.value(key)}" for key in ("task", "model", "model.path", "method") if starter.value(key)]
    file = shlex.quote(str(output))
    return "\n".join(
        [
            f"{output} is written: {', '.join(choices)}, {rows.count:,} rows",
            "",
            f"  dstune data show {file}   # the rows as the model sees them",
            f"  dstune plan {file}        # memory and time",
            f"  dstune train {file}",
        ]
    )
