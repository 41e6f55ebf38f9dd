"""The verb `dstune predict`: predicts labels, tags, answers, scores or vectors for rows, with a trained model."""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dstune.config.schema import ModelConfig
from dstune.core.arguments import VerbParser, is_path
from dstune.core.errors import EXIT_DONE, Problem, UserError
from dstune.data.message import content_text
from dstune.inference.answers_file import AnswersFile, add_flags, answers_file

if TYPE_CHECKING:
    from dstune.config.data_schema import DataConfig
    from dstune.data.files import DataFile
    from dstune.inference.load import ModelRequest
    from dstune.inference.predictor import Answer
    from dstune.inference.rows import Query, Rows

BLOCK = 512
"""Number of rows that are sorted by length and written together."""


def main(argv: list[str]) -> int:
    """Run `dstune predict RUN|CHECKPOINT|EXPORT|MODEL`. Raises UserError; returns the exit code."""
    arguments = _parse(argv)
    _print_status(f"reading {arguments.model}")
    from dstune.config.data_schema import OnBadRow
    from dstune.inference.load import find, load
    from dstune.inference.predictor import ANSWERS
    from dstune.inference.rows import MAX_LISTED_BAD_ROWS, Rows
    from dstune.protocols import task_of

    model_config = ModelConfig(
        path=arguments.model, revision=arguments.revision, trust_remote_code=arguments.trust_remote_code
    )
    request = find(model_config, arguments.checkpoint, arguments.overrides)
    data, task = request.config.data, task_of(request.config.task)
    if arguments.probabilities and not task.gives_probabilities:
        raise UserError(Problem("--probabilities", "only a classifier has them", "leave it out", task.name))
    files = [] if arguments.input is None else _files(data, arguments.input)
    # The run's own `data.on_bad_row` was about training rows.
    is_policy_given = any(word.startswith("data.on_bad_row=") for word in arguments.overrides)
    on_bad = data.on_bad_row if is_policy_given else OnBadRow.error
    rows = Rows(task.question(request.labels, data), arguments.texts, files, on_bad)
    if rows.bad:
        for problem in islice(rows.bad_rows(), MAX_LISTED_BAD_ROWS):
            _print_status(f"left out: {problem}")
        _print_status(f"{rows.bad:,} rows are bad and left out (data.on_bad_row=skip)")
    answer_columns = {*ANSWERS, "row"}
    if files:
        _note_replaced(rows, answer_columns)
    output = _output(arguments, files, rows, request) if arguments.output else None
    with tempfile.TemporaryDirectory(prefix="dstune-") as scratch:
        _print_status(f"loading the model for task={task.name}")
        model = load(request, Path(scratch))
        done = output.done if output else 0
        if done:
            _print_status(f"{done:,} of {rows.count:,} rows are there already")
        problems = cut = 0
        for block in rows.blocks(BLOCK, done):
            answers = model.answers(block, arguments.batch_size, all_labels=arguments.probabilities)
            problems += sum("problem" in answer for answer in answers)
            cut += sum("truncated" in answer for answer in answers)
            if plugin_columns := {name for answer in answers for name in answer} - answer_columns:  # a plugin's
                _note_replaced(rows, plugin_columns)
                answer_columns |= plugin_columns
            done += len(block)
            if output is not None:
                output.append(
                    [_row(query, answer, answer_columns) for query, answer in zip(block, answers, strict=True)]
                )
                _print_status(f"{done:,} of {rows.count:,} rows")
            else:
                _print(block, answers, answer_columns, as_json=arguments.json)
    if cut:
        _print_status(f"{cut:,} rows are longer than the model reads and were cut")
    if problems:
        _print_status(f"{problems:,} rows have no answer; their `problem` says why")
    if output is not None:
        output.finish()
        print(output.written)
    return EXIT_DONE


def _parse(argv: list[str]) -> argparse.Namespace:
    """Return the arguments, and in `texts` place and text of those that are in no file."""
    parser = VerbParser(
        prog="dstune predict",
        description="Labels, tags, answers, scores or vectors of rows that have none, from a trained model. Without --text "
        "and --input, standard input is a text a line.",
    )
    parser.add_argument(
        "model", metavar="RUN|CHECKPOINT|EXPORT|MODEL", help="run directory, folder, hub id or sample://NAME"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="such as `data.columns={text: review}` or `task.threshold=1`"
    )
    parser.add_argument("--text", action="append", default=[], metavar="TEXT", help="may be given several times")
    parser.add_argument(
        "--input",
        "--file",
        metavar="FILE",
        help="rows as in training without the answers: JSONL, CSV, Parquet, a text a line, a folder, a glob, a hub id",
    )
    add_flags(parser, "rows", 32)
    parser.add_argument(
        "--probabilities", action="store_true", help="of a classifier, with --json or --output: that of every label"
    )
    parser.add_argument("--revision", help="branch, tag or commit of a hub model")
    parser.add_argument("--trust-remote-code", action="store_true", help="run Python code that comes with the model")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    arguments = parser.parse_intermixed_args(argv)
    problems = []
    if not is_path(arguments.model):
        fix = f"dstune predict RUN {arguments.model}"
        problems.append(Problem("command line", "the run or model comes first", fix, arguments.model))
    if arguments.batch_size < 1:
        fix = "--batch-size 8"
        problems.append(Problem("--batch-size", "must be at least 1", fix, str(arguments.batch_size)))
    if arguments.text and arguments.input is not None:
        problems.append(Problem("--text", "is given beside --input", "give one of them"))
    if arguments.probabilities and not arguments.json and arguments.output is None:
        problems.append(Problem("--probabilities", "a line has no room for them", "--json, or --output FILE"))
    if not arguments.text and arguments.input is None and sys.stdin.isatty():
        problems.append(Problem("--text", "there is nothing to predict", "--text TEXT, or --input FILE"))
    if problems:
        raise UserError(problems)
    arguments.texts = [(f"--text {number}", text) for number, text in enumerate(arguments.text, 1)]
    if not arguments.text and arguments.input is None:
        lines = enumerate(sys.stdin.read().split("\n"), 1)
        arguments.texts = [(f"stdin:{number}", line.rstrip("\r")) for number, line in lines if line.strip()]
    return arguments


def _files(data: DataConfig, spec: str) -> list[DataFile]:
    """Return the files that `--input` names, to be read like those of the training; files that are not on this machine are
    fetched."""
    from dstune.config.data_schema import DataConfig
    from dstune.data import sources
    from dstune.launch import preflight

    test_data = DataConfig(test=spec, subset=data.subset, revision=data.revision, text_rows=data.text_rows)
    try:
        test_data = preflight.resolve_rows(test_data, "test", _print_status)
    except UserError as error:
        raise UserError(replace(p, where=p.where.replace("data.test", "--input")) for p in error.problems) from error
    return sources.of_part(test_data, "test", "--input")


def _note_replaced(rows: Rows, answer_columns: Set[str]) -> None:
    replaced = [name for name in rows.columns() if name in answer_columns]
    if replaced:
        _print_status(f"columns that answers have too are not kept: {', '.join(replaced)}")


def _output(arguments: argparse.Namespace, files: Sequence[DataFile], rows: Rows, request: ModelRequest) -> AnswersFile:
    import xxhash

    from dstune.data import sources

    texts = json.dumps(arguments.texts).encode("utf-8", "surrogatepass")
    identity = {
        "model": [arguments.model, request.identity],
        "overrides": arguments.overrides,
        "rows": [*(sources.fingerprint(file) for file in files), xxhash.xxh3_128_hexdigest(texts)],
        "count": rows.count,
        "probabilities": arguments.probabilities,
    }
    return answers_file(arguments.output, identity, BLOCK, force=arguments.force)


def _row(query: Query, answer: Answer, answer_columns: Set[str]) -> dict[str, Any]:
    """Return the place of a row, its columns and its answer. answer_columns: names of the answer, which replace columns of the
    row."""
    columns = {name: value for name, value in query.fields.items() if name not in answer_columns}
    row: dict[str, Any] = _plain({"row": query.place, **columns, **answer})
    return row


def _plain(value: Any) -> Any:
    """Return `value` as JSON that any reader takes: no number that is none, no half of a character, and text for what has no
    form there (the dates and decimals of a Parquet file)."""
    match value:
        case None | bool() | int():
            return value
        case float():
            return value if math.isfinite(value) else None
        case str():
            return value.encode("utf-8", "replace").decode()
        case Mapping():
            return {_plain(str(name)): _plain(part) for name, part in value.items()}
        case list() | tuple():
            return [_plain(part) for part in value]
    return str(value)


def _print(block: Sequence[Query], answers: Sequence[Answer], answer_columns: Set[str], *, as_json: bool) -> None:
    if not as_json:
        for line in _lines(block, answers):
            print(line, flush=True)
        return
    for query, answer in zip(block, answers, strict=True):
        print(json.dumps(_row(query, answer, answer_columns), ensure_ascii=False), flush=True)


def _lines(block: Sequence[Query], answers: Sequence[Answer]) -> Iterator[str]:
    """Yield one line per row: the answer, then as much of the row as fits."""
    room = shutil.get_terminal_size().columns
    for query, answer in zip(block, answers, strict=True):
        answer_text = _answer_line(answer)
        text = " ".join(_text(query).split())
        columns_left = room - len(answer_text) - 2
        yield (
            answer_text
            if columns_left < 10
            else f"{answer_text}  {text if len(text) <= columns_left else text[: columns_left - 3] + '...'}"
        )


def _answer_line(answer: Mapping[str, Any]) -> str:
    """Return an answer of any task, including those of plugins, as one line."""
    match answer:
        case {"problem": problem}:
            return f"no answer: {problem}"
        case {"vector": [*numbers]}:
            return f"[{', '.join(map(_formatted, numbers[:4]))}, ...] {len(numbers)} numbers"
        case {"score": float(score)}:
            return f"{score:8.4f}"
        case {"entities": [*entities]}:
            return "; ".join(f"{entity['type']}: {entity['text']}" for entity in entities) or "-"
        case {"predicted": [*labels], "probability": Mapping() as probabilities}:
            return ", ".join(f"{label} {_formatted(probabilities.get(label), 3)}" for label in labels) or "-"
        case {"predicted": str(label), "probability": float(probability)}:
            return f"{_formatted(label)}  {probability:.3f}"
        case {"predicted": found}:
            return _formatted(found)
    return _formatted({name: value for name, value in answer.items() if name != "truncated"})


def _formatted(value: Any, digits: int = 4) -> str:
    match value:
        case None | "":
            return "-"
        case float():
            return f"{value:.{digits}f}"
        case [*parts]:
            return " ".join(map(_formatted, parts)) or "-"
        case Mapping():
            return ", ".join(f"{name} {_formatted(part)}" for name, part in value.items()) or "-"
    return str(value)


def _text(query: Query) -> str:
    row = query.row
    for name in ("text", "anchor", "question", "prompt"):
        if name in row:
            return str(row[name])
    match row:
        case {"tokens": [*tokens]}:
            return " ".join(map(str, tokens))
        case {"messages": [*_, {"content": content}]}:
            return content_text(content)
    return _formatted(row)


def _print_status(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
