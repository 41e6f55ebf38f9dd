"""The verb `compare`: whether a new model answers the same prompts as well as the old one."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from dstune import __version__
from dstune.core import files
from dstune.core.arguments import VerbParser
from dstune.core.errors import EXIT_DONE, EXIT_FAILED, Problem, UserError
from dstune.core.parsing import parse_json
from dstune.grading.similarity import rouge_l
from dstune.grading.verdicts import FEWEST, PASSED, SLICE_ROWS, UNDECIDED, WORSE, Comparison, GateResult, decide
from dstune.recording.folder import MANIFEST, read_lines, read_object
from dstune.recording.prompts import Prompt, prompt_of, read_prompts
from dstune.report.html import render

DESCRIPTION = """\
Compare the answers of two models to the same prompts, from two recordings of `dstune record`. To compare a run, serve it
(`dstune serve`) and record its answers to the prompts of the old recording. Only prompts with an expected answer count; prompts
of the training files that the recordings hold are left out.
Exit codes: 0 the new model passed, 1 it is worse or it is undecided.
"""
SHORT = 60
"""Characters of a short answer, which is compared as a whole."""
MOST_CLASSES = 50
EXAMPLES = 50
SHOWN = 2_000
"""Characters of a text in the report."""


@dataclass(frozen=True)
class Row:
    """A prompt, its expected answer, and the answers of both models."""

    prompt: str
    expected: str
    old: str
    new: str


Score = Callable[[str, str], float]
"""The score of an answer and the expected one, from 0 to 1."""


@dataclass(frozen=True)
class Kind:
    """A kind of task: its rows, and how their answers are scored."""

    name: str
    rows: list[Row]
    scores: Mapping[str, Score]
    """By what they measure; the first one also orders the examples."""
    has_classes: bool = False


@dataclass(frozen=True)
class Result:
    """The result of a comparison."""

    old: str
    new: str
    verdict: str
    gates: list[GateResult]
    notes: list[str] = field(default_factory=list)


def main(argv: list[str]) -> int:
    """Run the verb and return the exit code. Raises UserError."""
    arguments = make_parser().parse_args(argv)
    check(arguments)
    old, new = Answers.read(arguments.old, arguments.old_model), Answers.read(arguments.new, arguments.new_model)
    if old.redact != new.redact:
        reason = f"the old recording masks {old.redact or 'nothing'}, the new one {new.redact or 'nothing'}"
        raise UserError(Problem("NEW", reason, "record both with the same --redact", str(arguments.new)))
    trained = training_keys(arguments.old) | training_keys(arguments.new)
    trained |= {prompt.key for prompt in read_prompts(arguments.trained_on, ())}
    rows, notes = pair(old, new, trained)
    kinds = kinds_of(rows)
    if not kinds:
        reason = f"no kind of task has {FEWEST} prompts that both answered: {'; '.join(notes) or 'they share none'}"
        fix = "record both with the same --prompts, whose rows have an answer"
        raise UserError(Problem("NEW", reason, fix, str(arguments.new)))
    gates = judge(kinds, arguments.margin, arguments.error)
    result = Result(old.model, new.model, verdict_of_all(gates), gates, notes)
    write(arguments.output, result, kinds)
    for gate in gates:
        print(f"{gate.verdict:10} {gate.name}: {gate.reason}")
    for note in notes:
        print(note)
    print(f"{result.verdict}: {arguments.output / 'report.html'} has examples side by side")
    return EXIT_DONE if result.verdict == PASSED else EXIT_FAILED


def make_parser() -> VerbParser:
    parser = VerbParser("dstune compare", description=DESCRIPTION, allow_abbrev=False)
    parser.add_argument("old", type=Path, metavar="OLD", help="recording of the model that answers today")
    parser.add_argument("new", type=Path, metavar="NEW", help="recording of the model to replace it")
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="for report.html, comparison.json")
    parser.add_argument("--old-model", metavar="NAME", help="if the recording has several")
    parser.add_argument("--new-model", metavar="NAME", help="if the recording has several")
    parser.add_argument("--margin", type=float, default=0.02, help="how much of its score the new one may lose [0.02]")
    parser.add_argument("--error", type=float, default=0.025, help="chance of a wrong verdict, of all kinds [0.025]")
    parser.add_argument(
        "--trained-on", action="append", default=[], metavar="FILE", help="rows to leave out: a model trained on them"
    )
    return parser


def check(arguments: argparse.Namespace) -> None:
    """Raises UserError for invalid flags."""
    problems = []
    if not 0 <= arguments.margin < 1:
        problems.append(Problem("--margin", "expected a share below 1", "--margin 0.02", f"{arguments.margin:g}"))
    if not 0 < arguments.error < 0.5:
        problems.append(Problem("--error", "expected a chance below 0.5", "--error 0.025", f"{arguments.error:g}"))
    if problems:
        raise UserError(problems)


@dataclass(frozen=True)
class Answers:
    """The recorded answers of one model."""

    model: str
    redact: list[str]
    records: dict[str, dict[str, Any]]
    """By the prompt's key."""

    @classmethod
    def read(cls, folder: Path, model: str | None) -> Answers:
        """Read the answers of `model`, or of the only one. Raises UserError."""
        manifest = read_object(folder / MANIFEST, folder)
        by_model: dict[str, dict[str, dict[str, Any]]] = {}
        for path in sorted((folder / "answers").glob("*.jsonl")):
            for record in read_lines(path):
                by_model.setdefault(str(record.get("model")), {})[str(record.get("key"))] = record
        if model is None and len(by_model) == 1:
            model = next(iter(by_model))
        if model is None or model not in by_model:
            reason = "which model?" if model is None else f"it has no answers of {model}"
            fix = (
                f"--old-model or --new-model, one of: {', '.join(by_model)}" if by_model else "dstune record --prompts"
            )
            raise UserError(Problem("OLD, NEW", reason, fix, str(folder)))
        return cls(model, list(manifest.get("redact") or []), by_model[model])


def training_keys(folder: Path) -> set[str]:
    """Return the keys of the prompts in the training files of a recording's jobs."""
    identifiers = set()
    for path in (folder / "jobs").glob("*.json"):
        job = read_object(path, folder).get("job")
        if isinstance(job, dict):
            identifiers.add(job.get("training_file"))
    keys: set[str] = set()
    for path in (folder / "files").glob("*.json"):
        record = read_object(path, folder)
        if record.get("file", {}).get("id") in identifiers:
            rows = read_lines(path.with_name(Path(str(record.get("content"))).name))
            keys |= {prompt.key for row in rows if (prompt := prompt_of(row, "")) is not None}
    return keys


def pair(old: Answers, new: Answers, trained: set[str]) -> tuple[list[Row], list[str]]:
    """Return the rows that count, and notes about the others."""
    rows: list[Row] = []
    counts: Counter[str] = Counter()
    for key, record in old.records.items():
        if key not in new.records:
            counts["only the old model was asked"] += 1
        elif _stored_key(record) in trained or key in trained:
            counts["in a training file"] += 1
        elif not (expected := _text(record.get("expected"))):
            counts["without an expected answer"] += 1
        else:
            for name, version in (("old", record), ("new", new.records[key])):
                counts[f"without an answer of the {name} model, which counts as wrong"] += "error" in version
            question = _text((record.get("messages") or [{}])[-1])
            answers = (_text(version.get("answer")) for version in (record, new.records[key]))
            rows.append(Row(question, expected, *answers))
    return rows, [f"{count:,} prompts {reason}" for reason, count in counts.items() if count]


def _stored_key(record: Mapping[str, Any]) -> str:
    """Return the key of the prompt as it is stored: masked, if the recording is."""
    messages, options = record.get("messages"), record.get("options")
    return Prompt("", messages if isinstance(messages, list) else [], options if isinstance(options, dict) else {}).key


def _text(message: Any) -> str:
    """Return the text of a message; its tool calls as JSON, if it has no text."""
    if not isinstance(message, dict):
        return ""
    content = message.get("content")
    if isinstance(content, list):
        content = "\n".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    if content:
        return str(content).strip()
    calls = message.get("tool_calls")
    functions = [call.get("function") for call in calls if isinstance(call, dict)] if isinstance(calls, list) else []
    return json.dumps({"tool_calls": functions}) if functions else ""


def kinds_of(rows: Sequence[Row]) -> list[Kind]:
    """Return the rows by kind of task, which the expected answers show; kinds with too few rows are left out."""
    objects = [row for row in rows if _object(row.expected) is not None]
    others = [row for row in rows if _object(row.expected) is None]
    short = [row for row in others if len(row.expected) <= SHORT]
    long = [row for row in others if len(row.expected) > SHORT]
    classes = len({row.expected for row in short})
    is_classified = 1 < classes <= MOST_CLASSES and 2 * classes <= len(short)
    kinds = [
        Kind("JSON", objects, {"agreement of fields": agreement, "valid": is_valid}),
        Kind("classes" if is_classified else "short answers", short, {"exact match": exact}, is_classified),
        Kind("texts", long, {"similarity (ROUGE-L)": similarity}),
    ]
    return [kind for kind in kinds if len(kind.rows) >= FEWEST]


def _object(text: str) -> dict[str, Any] | None:
    try:
        value = parse_json(text)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def exact(answer: str, expected: str) -> float:
    return float(answer == expected)


def is_valid(answer: str, expected: str) -> float:
    return float(_object(answer) is not None)


def agreement(answer: str, expected: str) -> float:
    """Return the share of fields, expected or answered, that have the same value."""
    answered, fields = _object(answer), _object(expected)
    if answered is None or fields is None:
        return 0.0
    names = {*answered, *fields}
    same = sum(name in answered and name in fields and answered[name] == fields[name] for name in names)
    return same / len(names) if names else 1.0


def similarity(answer: str, expected: str) -> float:
    return rouge_l(answer, expected)


def scores_of(rows: Sequence[Row], score: Score) -> tuple[np.ndarray, np.ndarray]:
    """Return the scores of the old and the new model, [rows] each."""
    return (
        np.array([score(row.old, row.expected) for row in rows]),
        np.array([score(row.new, row.expected) for row in rows]),
    )


def judge(kinds: Sequence[Kind], margin: float, error: float) -> list[GateResult]:
    """Decide every kind of task, and every class with enough rows, within one error budget."""
    comparisons = []
    for kind in kinds:
        for name, score in kind.scores.items():
            comparisons.append(Comparison(f"{kind.name}: {name}", *scores_of(kind.rows, score), margin, is_set=True))
        if kind.has_classes:
            for label, count in sorted(Counter(row.expected for row in kind.rows).items()):
                if count >= SLICE_ROWS:
                    rows = [row for row in kind.rows if row.expected == label]
                    comparisons.append(Comparison(f"{kind.name}: {label}", *scores_of(rows, exact), margin))
    return decide(comparisons, error, len(comparisons))


def verdict_of_all(gates: Sequence[GateResult]) -> str:
    """Return `worse` if anything is worse, `passed` if every kind of task passed, and `undecided` otherwise. A class that is
    undecided, as one with few rows is, holds nothing up."""
    if any(gate.verdict == WORSE for gate in gates):
        return WORSE
    return PASSED if all(gate.verdict == PASSED for gate in gates if gate.is_set) else UNDECIDED


def write(folder: Path, result: Result, kinds: Sequence[Kind]) -> None:
    """Write report.html and comparison.json, which only this user can read."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    files.write(folder / "comparison.json", json.dumps(asdict(result), indent=2) + "\n", mode=0o600)
    html = render(
        "comparison.html.j2",
        package="dstune.recording",
        title="Old and new model",
        comparison=result,
        examples=examples_of(kinds),
        version=__version__,
        made=datetime.now(UTC).strftime("%-d %B %Y, %H:%M UTC"),
    )
    files.write(folder / "report.html", html, mode=0o600)


def examples_of(kinds: Sequence[Kind]) -> list[dict[str, Any]]:
    """Return the rows whose scores differ most, losses first."""
    examples: list[dict[str, Any]] = []
    for kind in kinds:
        score = next(iter(kind.scores.values()))
        for row in kind.rows:
            texts = {name: text[:SHOWN] for name, text in asdict(row).items()}
            scores = {"old_score": score(row.old, row.expected), "new_score": score(row.new, row.expected)}
            examples.append(texts | scores)

    def order(example: Mapping[str, Any]) -> tuple[float, bool]:
        gain = example["new_score"] - example["old_score"]
        return -abs(gain), gain > 0

    return sorted(examples, key=order)[:EXAMPLES]
