"""The verb `dstune predict`: labels, tags, answers, scores or vectors of rows that have none, from a trained model."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dstune.arguments import VerbParser, is_path
from dstune.config.schema import ModelConfig
from dstune.errors import EXIT_DONE, Problem, UserError
from dstune.generate.answers_file import AnswersFile

if TYPE_CHECKING:
    from dstune.predict.load import Wanted
    from dstune.predict.rows import Asked, Rows

BATCHES = 16
"""Batches of a block, whose rows are sorted by length and written at once."""


def main(argv: list[str]) -> int:
    """`dstune predict RUN|CHECKPOINT|EXPORT|MODEL`. Raises UserError; returns the exit code."""
    arguments = _parse(argv)
    _tell(f"reading {arguments.model}")
    from dstune.predict.load import find, load
    from dstune.predict.rows import Question, Rows

    with tempfile.TemporaryDirectory(prefix="dstune-") as scratch:
        named = ModelConfig(
            path=arguments.model, revision=arguments.revision, trust_remote_code=arguments.trust_remote_code
        )
        wanted = find(named, arguments.checkpoint, arguments.overrides, Path(scratch))
        question = Question(wanted.config.task, wanted.labels, wanted.config.data.columns)
        rows = Rows(question, arguments.text, arguments.input)
        output = _output(arguments, rows, wanted) if arguments.output else None
        _tell(f"loading the model for task={wanted.config.task.name}")
        model = load(wanted)
        size = arguments.batch_size * BATCHES
        done = output.done if output else 0
        if done:
            _tell(f"{done:,} of {rows.count:,} rows are there already")
        for block in rows.blocks(size, done):
            answers = model.answers(block, arguments.batch_size, all_labels=arguments.probabilities)
            found = [_row(one, answer) for one, answer in zip(block, answers, strict=True)]
            done += len(block)
            if output is not None:
                output.append(found)
                _tell(f"{done:,} of {rows.count:,} rows")
            elif arguments.json:
                for row in found:
                    print(json.dumps(row, ensure_ascii=False), flush=True)
            else:
                for line in _lines(block, answers):
                    print(line, flush=True)
        if output is not None:
            output.finish()
            print(output.path)
    return EXIT_DONE


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = VerbParser(
        prog="dstune predict",
        description="Labels, tags, answers, scores or vectors of rows that have none, from a trained model.",
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
        help="rows as in training without the labels: JSONL, CSV, Parquet, a text a line, a folder, a glob, a hub id",
    )
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="answers as JSON lines; killed and repeated, it goes on"
    )
    parser.add_argument("--force", action="store_true", help="replace the file of --output")
    parser.add_argument("--batch-size", type=int, default=32, metavar="N", help="rows computed together (default 32)")
    parser.add_argument("--checkpoint", default="last", help="of a run: a step, `best` or `last` (default)")
    parser.add_argument("--probabilities", action="store_true", help="of a classifier: that of every label")
    parser.add_argument("--revision", help="branch, tag or commit of a hub model")
    parser.add_argument("--trust-remote-code", action="store_true", help="run Python code that comes with the model")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    arguments = parser.parse_intermixed_args(argv)
    problems = []
    if not is_path(arguments.model):
        fix = f"dstune predict RUN {arguments.model}"
        problems.append(Problem("command line", "the run or model comes first", fix, arguments.model))
    if arguments.batch_size < 1:
        problems.append(Problem("--batch-size", "must be at least 1", value=str(arguments.batch_size)))
    if arguments.text and arguments.input is not None:
        problems.append(Problem("--text", "is given beside --input", "give one of them"))
    if not arguments.text and arguments.input is None and sys.stdin.isatty():
        problems.append(Problem("--text", "there is nothing to predict", "--text TEXT, or --input FILE"))
    if problems:
        raise UserError(problems)
    if not arguments.text and arguments.input is None:
        arguments.text = [line for line in sys.stdin.read().splitlines() if line.strip()]
    return arguments


def _output(arguments: argparse.Namespace, rows: Rows, wanted: Wanted) -> AnswersFile:
    import xxhash

    from dstune.checkpoint import store
    from dstune.data import sources

    newest = store.newest(Path(arguments.model))
    asked = {
        "model": [arguments.model, arguments.revision, arguments.checkpoint, newest.name if newest else None],
        "overrides": arguments.overrides,
        "rows": [sources.fingerprint(file) for file in rows.files]
        or xxhash.xxh3_128_hexdigest(json.dumps(arguments.text).encode("utf-8", "surrogatepass")),
        "count": rows.count,
        "probabilities": arguments.probabilities,
        "labels": list(wanted.labels),
    }
    return AnswersFile(arguments.output, asked, arguments.batch_size * BATCHES, force=arguments.force)


def _row(one: Asked, answer: Mapping[str, Any]) -> dict[str, Any]:
    """The row as it was given, where it is, and its answer, which stands above a column of the same name."""
    return {"row": one.place, **one.fields, **answer}


def _lines(block: list[Asked], answers: list[dict[str, Any]]) -> Iterator[str]:
    """One line a row: the answer, then as much of the row as there is room for."""
    room = shutil.get_terminal_size().columns
    for one, answer in zip(block, answers, strict=True):
        told = _told(answer)
        text = " ".join(_text(one).split())
        left = room - len(told) - 2
        yield told if left < 10 else f"{told}  {text if len(text) <= left else text[: left - 3] + '...'}"


def _told(answer: Mapping[str, Any]) -> str:
    if "vector" in answer:
        first = ", ".join(f"{value:.4f}" for value in answer["vector"][:4])
        return f"[{first}, ...] {len(answer['vector'])} numbers"
    if "score" in answer:
        return f"{answer['score']:8.4f}"
    found, probability = answer["predicted"], answer.get("probability")
    if "entities" in answer:
        return "; ".join(f"{one['type']}: {one['text']}" for one in answer["entities"]) or "-"
    if isinstance(found, float):
        return f"{found:.4f}"
    if isinstance(probability, Mapping):
        return ", ".join(f"{label} {probability[label]:.3f}" for label in found) or "-"
    if isinstance(found, list):
        return " ".join(found)
    return f"{found}  {probability:.3f}" if probability is not None else found or "-"


def _text(one: Asked) -> str:
    row = one.row
    for name in ("text", "anchor", "question", "prompt"):
        if name in row:
            return str(row[name])
    return " ".join(row["tokens"]) if "tokens" in row else str(row["messages"][-1]["content"])


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
