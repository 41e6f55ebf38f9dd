"""The verb `compare`: whether a new model answers the same prompts as well as the old one."""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dstune import __version__
from dstune.core import files
from dstune.core.api_client import Address, check_address
from dstune.core.arguments import VerbParser
from dstune.core.errors import EXIT_DONE, EXIT_FAILED, EXIT_PREEMPTED, Problem, UserError
from dstune.core.text import one_line
from dstune.grading.verdicts import FEWEST, PASSED, GateResult
from dstune.recording.answers import Asking
from dstune.recording.folder import MANIFEST, Folder
from dstune.recording.kinds import Kind, Row, decide_kinds, kinds_of, verdict_of_all
from dstune.recording.masking import make_redactor
from dstune.recording.options import read_key
from dstune.recording.preference import Judge, LocalJudge, ServedJudge, preferences
from dstune.recording.prompts import Prompt, prompt_of, read_prompts, text_of, without_repeats
from dstune.recording.sides import LocalModel, Record, RecordedModel, Records, ServedModel, Side
from dstune.recording.trained import FLAG, TrainedPrompts, run_of
from dstune.report.html import render

DESCRIPTION = """\
Compare the answers of two models to the same prompts. OLD and NEW are each a recording of `dstune record`, the address of a server
with OpenAI's API (http://HOST:PORT/v1), or a run, an export, a folder or a hub id, which is asked on this machine. Prompts are
those of a recording, of --prompts, or the held-out rows of a run; those that either model was trained on are left out. Only prompts
with an expected answer count, unless --judge names a model that judges all answers.
Exit codes: 0 the new model passed, 1 it is worse or it is undecided, 75 interrupted: the same command goes on.
"""
EXAMPLES = 50
SHOWN = 2_000
"""Characters of a text in the report."""
SETTINGS = {"temperature": 0.0, "seed": 0, "max_tokens": 1024}
"""How models are asked if no recording says it."""
OLD, NEW = "OLD", "NEW"


@dataclass(frozen=True)
class Result:
    """The result of a comparison."""

    old: str
    new: str
    verdict: str
    gates: list[GateResult]
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Question:
    """A prompt that counts."""

    asked: Prompt
    stored: Prompt
    """The same as it is stored, with its expected answer: masked, if the recording is."""


def main(argv: list[str]) -> int:
    """Run the verb and return the exit code. Raises DstuneError."""
    arguments = make_parser().parse_args(argv)
    check(arguments)
    old, new = side_of(OLD, arguments.old, arguments), side_of(NEW, arguments.new, arguments)
    judge = judge_of(arguments)
    arguments.output.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        result, kinds = compare(old, new, judge, arguments)
    except KeyboardInterrupt:
        print("dstune: interrupted; the same command goes on", file=sys.stderr)
        return EXIT_PREEMPTED
    write(arguments.output, result, kinds)
    for gate in result.gates:
        print(f"{gate.verdict:10} {gate.name}: {gate.reason}")
    for note in result.notes:
        print(note)
    print(f"{result.verdict}: {arguments.output / 'report.html'} has examples side by side")
    return EXIT_DONE if result.verdict == PASSED else EXIT_FAILED


def make_parser() -> VerbParser:
    parser = VerbParser("dstune compare", description=DESCRIPTION, allow_abbrev=False)
    parser.add_argument("old", metavar="OLD", help="the model that answers today: a recording, an address or a model")
    parser.add_argument("new", metavar="NEW", help="the model to replace it: a recording, an address or a model")
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="for report.html, comparison.json")
    parser.add_argument("--margin", type=float, default=0.02, help="how much of its score the new one may lose [0.02]")
    parser.add_argument("--error", type=float, default=0.025, help="chance of a wrong verdict, of all kinds [0.025]")
    prompts = parser.add_argument_group("prompts")
    prompts.add_argument(
        "--prompts", action="append", default=[], metavar="FILE", help="rows, logs or a list of prompts, as data.train"
    )
    prompts.add_argument(
        "--trained-on", action="append", default=[], metavar="FILE", help="rows to leave out: a model trained on them"
    )
    asking = parser.add_argument_group("how models are asked [as the recording was]")
    asking.add_argument("--temperature", type=float, help="[0]")
    asking.add_argument("--seed", type=int, help="[0]")
    asking.add_argument("--max-tokens", type=int, metavar="N", help="of an answer [1024]")
    asking.add_argument("--batch-size", type=int, default=8, metavar="N", help="prompts computed together, here [8]")
    asking.add_argument("--at-once", type=int, default=4, metavar="N", help="requests to a server at a time [4]")
    asking.add_argument("--attempts", type=int, default=8, metavar="N", help="of a request, with growing pauses [8]")
    asking.add_argument("--seconds", type=float, default=300.0, metavar="S", help="without a byte from a server [300]")
    for flag, word in (("old", OLD), ("new", NEW)):
        side = parser.add_argument_group(f"if {word} is a server or a recording of several models")
        side.add_argument(f"--{flag}-model", metavar="NAME")
        _add_key(side, flag)
    judging = parser.add_argument_group("a judge")
    judging.add_argument(
        "--judge", metavar="MODEL|URL", help="judges each pair of answers twice, with the positions swapped"
    )
    judging.add_argument("--judge-model", metavar="NAME", help="the server's model that judges")
    _add_key(judging, "judge")
    return parser


def _add_key(group: argparse._ActionsContainer, flag: str) -> None:
    group.add_argument(f"--{flag}-key-variable", metavar="NAME", help="variable with its key [OPENAI_API_KEY]")
    group.add_argument(
        f"--{flag}-key-file", type=Path, metavar="FILE", help="file with its key, which only you can read"
    )


def check(arguments: argparse.Namespace) -> None:
    """Raises UserError with every invalid flag."""
    problems = []
    if not 0 <= arguments.margin < 1:
        problems.append(Problem("--margin", "expected a share below 1", "--margin 0.02", f"{arguments.margin:g}"))
    if not 0 < arguments.error < 0.5:
        problems.append(Problem("--error", "expected a chance below 0.5", "--error 0.025", f"{arguments.error:g}"))
    for name, least in {"max_tokens": 1, "batch_size": 1, "at_once": 1, "attempts": 1, "temperature": 0}.items():
        value = getattr(arguments, name)
        if value is not None and not value >= least:
            flag = f"--{name.replace('_', '-')}"
            problems.append(Problem(flag, f"expected at least {least}", f"{flag} {least}", f"{value:g}"))
    if not arguments.seconds > 0:
        problems.append(Problem("--seconds", "expected more than 0", "--seconds 300", f"{arguments.seconds:g}"))
    is_address = arguments.judge is not None and "://" in arguments.judge and not arguments.judge.startswith("sample:")
    if is_address != (arguments.judge_model is not None):
        reason = "a judge on a server has an address and a name"
        problems.append(Problem("--judge-model", reason, "--judge URL --judge-model NAME"))
    if problems:
        raise UserError(problems)


# -- sides


def side_of(flag: str, word: str, arguments: argparse.Namespace) -> Side:
    """Return the side that a word names. flag: OLD or NEW. Raises UserError."""
    name = getattr(arguments, f"{flag.lower()}_model")
    if word.startswith(("http://", "https://")):
        return ServedModel(flag, _address(flag, word, flag.lower(), arguments), name, arguments.at_once)
    path = Path(word)
    if (path / MANIFEST).is_file():
        return RecordedModel.read(flag, path, name)
    is_model = any((path / file).is_file() for file in ("run.yaml", "config.json", "adapter_config.json"))
    if path.exists() and not is_model and path.parent.name != "checkpoints":
        raise UserError(Problem(flag, "is no recording, run or model", "a folder of `dstune record`, or a run", word))
    from dstune.launch import rundir

    rundir.refuse_missing(path)
    if name is not None:
        reason = "a model on this machine has no other name"
        raise UserError(Problem(f"--{flag.lower()}-model", reason, "leave it out", name))
    return LocalModel(flag, word, arguments.batch_size)


def judge_of(arguments: argparse.Namespace) -> Judge | None:
    """Return the judge that the flags name; None without one. Raises UserError."""
    if arguments.judge is None:
        return None
    if arguments.judge_model is None:
        return LocalJudge(arguments.judge)
    address = _address("--judge", arguments.judge, "judge", arguments)
    return ServedJudge(address, arguments.judge_model, arguments.at_once)


def _address(flag: str, url: str, name: str, arguments: argparse.Namespace) -> Address:
    file, variable = getattr(arguments, f"{name}_key_file"), getattr(arguments, f"{name}_key_variable")
    return Address(
        check_address(flag, url),
        read_key(file, variable, "OPENAI_API_KEY", f"--{name}-key"),
        attempts=arguments.attempts,
        seconds=arguments.seconds,
        flag=flag,
        fix=f"check the address and the key (--{name}-key-variable, --{name}-key-file); the same command goes on",
    )


# -- prompts


def compare(old: Side, new: Side, judge: Judge | None, arguments: argparse.Namespace) -> tuple[Result, list[Kind]]:
    """Ask what is not recorded, and judge. Raises DstuneError."""
    trained = trained_prompts([(OLD, old), (NEW, new)], arguments.trained_on)
    candidates, notes = candidates_of(old, new, arguments.prompts)
    counts: Counter[str] = Counter()
    questions: dict[str, Question] = {}
    for key, question in candidates.items():
        if question.asked in trained or question.stored in trained:
            counts["are left out: a model was trained on them"] += 1
        elif judge is None and not text_of(question.stored.expected):
            counts["have no expected answer"] += 1
        else:
            questions[key] = question
    notes += [f"{count:,} prompts {reason}" for reason, count in counts.items()] + trained.notes
    if len(questions) < FEWEST:
        reason = f"{len(questions)} prompts are left, {FEWEST} are needed: {'; '.join(notes)}"
        raise UserError(Problem("--prompts", reason, "--prompts FILE, of rows with answers that neither trained on"))
    notes.insert(0, f"{len(questions):,} prompts are compared")
    print(notes[0], flush=True)
    (old_name, old_records), (new_name, new_records) = ask_both(old, new, questions, arguments)
    questions, notes[1:1] = answered_by(OLD, old_name, questions, old_records)
    rows, missing = rows_of(questions, old_records, new_records)
    if judge is not None:
        rows, note = judged(list(questions.values()), rows, judge, arguments.output)
        missing.append(note)
    kinds, few = kinds_of(rows)
    notes += missing + few
    if not kinds:
        fix = "--prompts FILE, with more rows"
        raise UserError(Problem("--prompts", f"no kind of task has {FEWEST} prompts: {'; '.join(notes)}", fix))
    gates = decide_kinds(kinds, arguments.margin, arguments.error)
    return Result(old_name, new_name, verdict_of_all(gates), gates, notes), kinds


def trained_prompts(sides: Sequence[tuple[str, Side]], specs: Sequence[str]) -> TrainedPrompts:
    """Return the prompts that the models of both sides were trained on. specs: those of --trained-on. Raises UserError."""
    trained = TrainedPrompts()
    trained.add_files(specs)
    for flag, side in sides:
        run = run_of(side.path) if isinstance(side, LocalModel) else None
        if isinstance(side, RecordedModel):
            is_known = trained.add_recording(side.folder)
        elif run is not None:
            trained.add_run(run, are_named=bool(specs))
            is_known = True
        else:
            is_known = False
        if not is_known and not specs:
            trained.notes.append(f"what {flag} was trained on is not known: {FLAG} leaves such prompts out")
    return trained


def candidates_of(old: Side, new: Side, specs: Sequence[str]) -> tuple[dict[str, Question], list[str]]:
    """Return the prompts by key, and notes about those that cannot be compared. Raises UserError."""
    recorded = [side for side in (old, new) if isinstance(side, RecordedModel)]
    given = without_repeats(read_prompts(specs, ()))
    if not recorded:
        prompts = given if specs else held_out_prompts(old, new)
        return {key: Question(prompt, prompt) for key, prompt in prompts.items()}, []
    if len(recorded) == 2 and recorded[0].redact != recorded[1].redact:
        masks = [side.redact or "nothing" for side in recorded]
        reason = f"the old recording masks {masks[0]}, the new one {masks[1]}"
        raise UserError(Problem(NEW, reason, "record both with the same --redact", str(recorded[1].folder)))
    counts: Counter[str] = Counter()
    questions = {}
    for key, record in recorded[0].records.items():
        stored = _stored(record)
        asked = given.get(key, stored)
        if specs and key not in given:
            counts["of the recording are not among --prompts"] += 1
        elif len(recorded) == 2 and key not in recorded[1].records:
            counts["only the old model was asked"] += 1
        elif len(recorded) == 1 and asked.key != key:
            counts["are masked in the recording: --prompts FILE has to name the original ones"] += 1
        else:
            questions[key] = Question(asked, stored)
    notes = [f"{count:,} prompts {reason}" for reason, count in counts.items()]
    settings = [side.asking or {} for side in recorded]
    names = [name for name in SETTINGS if settings[0].get(name) != settings[-1].get(name)]
    if names:
        notes.append(f"the recordings were asked with another value of: {', '.join(names)}")
    return questions, notes


def held_out_prompts(old: Side, new: Side) -> dict[str, Prompt]:
    """Return the prompts of the held-out rows of a run, the old one's if both have some. Raises UserError."""
    from dstune.data.run_rows import read_run_parts

    for side in (old, new):
        run = run_of(side.path) if isinstance(side, LocalModel) else None
        if run is None:
            continue
        _, parts = read_run_parts(run, fix="--prompts FILE")
        rows = [*parts.get("validation", []), *parts.get("test", [])]
        if prompts := [prompt for place, row in rows if (prompt := prompt_of(row, place)) is not None]:
            return without_repeats(prompts)
    reason = "neither side is a recording, or a run with held-out rows"
    raise UserError(Problem("--prompts", reason, "--prompts FILE, of rows with answers"))


def _stored(record: Record) -> Prompt:
    """Return the prompt of a recorded answer, with the expected answer."""
    messages, options, expected = (record.get(name) for name in ("messages", "options", "expected"))
    users = record.get("users")
    return Prompt(
        str(record.get("place")),
        [message for message in messages if isinstance(message, dict)] if isinstance(messages, list) else [],
        options if isinstance(options, dict) else {},
        expected if isinstance(expected, dict) else None,
        tuple(map(str, users)) if isinstance(users, list) else (),
    )


# -- answers


def ask_both(
    old: Side, new: Side, questions: Mapping[str, Question], arguments: argparse.Namespace
) -> tuple[tuple[str, Records], tuple[str, Records]]:
    """Return the name of each model and its answers; models that are not recorded are asked. Raises DstuneError."""
    prompts = {key: question.asked for key, question in questions.items()}
    for side in (old, new):
        if isinstance(side, LocalModel):
            side.check(prompts)
    recorded = [side for side in (old, new) if isinstance(side, RecordedModel)]
    settings: dict[str, Any] = dict(SETTINGS)
    for name in SETTINGS:
        given = getattr(arguments, name)
        stated = recorded[0].asking.get(name) if recorded and recorded[0].asking else None
        settings[name] = next(value for value in (given, stated, settings[name]) if value is not None)
    asking = Asking(**settings, logprobs=-1)
    redact = recorded[0].redact if recorded else []
    answers: list[tuple[str, Records]] = []
    for part, side, other in (("old", old, new), ("new", new, old)):
        if isinstance(side, RecordedModel):
            answers.append((side.model, side.records))
            continue
        key = side.address.key if isinstance(side, ServedModel) else ""
        other_name = other.model if isinstance(other, RecordedModel | ServedModel) else None
        folder = Folder(arguments.output / part, make_redactor(redact), key)
        try:
            folder.hold_settings(redact=redact, asking=settings)
            answers.append(side.ask(prompts, asking, folder, other_name or ""))
        finally:
            folder.close()
    return answers[0], answers[1]


def answered_by(
    flag: str, model: str, questions: Mapping[str, Question], records: Records
) -> tuple[dict[str, Question], list[str]]:
    """Return the questions that the old model answered, and a note about the others: as wrong answers, they would let any new model
    pass. Raises UserError if too few are left."""
    answered = {key: question for key, question in questions.items() if "error" not in records.get(key, {"error": {}})}
    count = len(questions) - len(answered)
    if len(answered) >= FEWEST:
        return answered, [f"{count:,} prompts are left out: {OLD} has no answer to them"] if count else []
    errors = (records[key].get("error") for key in questions if key in records and key not in answered)
    error = next(errors, None)
    first = error.get("message") if isinstance(error, dict) else error
    reason = f"{model} answered {len(answered)} of {len(questions):,} prompts, {FEWEST} are needed"
    fix = "a model that answers; `dstune record` asks again for the answers that a recording lacks"
    raise UserError(Problem(flag, f"{reason}: {one_line(str(first))[:200]}" if first else reason, fix))


def rows_of(questions: Mapping[str, Question], old: Records, new: Records) -> tuple[list[Row], list[str]]:
    """Return the answers side by side, and a note about those of the new model that are missing."""
    rows: list[Row] = []
    missing = 0
    for key, question in questions.items():
        answer = new.get(key, {"error": {}})
        missing += "error" in answer
        prompt = text_of(question.stored.messages[-1]) if question.stored.messages else ""
        expected, old_answer = text_of(question.stored.expected), text_of(old[key].get("answer"))
        rows.append(Row(prompt, expected, old_answer, text_of(answer.get("answer"))))
    return rows, [f"{missing:,} prompts have no answer of the new model, which counts as wrong"] if missing else []


def judged(questions: Sequence[Question], rows: Sequence[Row], judge: Judge, output: Path) -> tuple[list[Row], str]:
    """Return the rows with the judge's verdicts, and a note. Raises UserError if it gave too few."""
    pairs = [
        {"question": _conversation(question.stored), "expected": row.expected, "old": row.old, "new": row.new}
        for question, row in zip(questions, rows, strict=True)
    ]
    print(f"the judge is asked about {len(pairs):,} pairs of answers, each twice", flush=True)
    verdicts, reason = preferences(judge, pairs, output / "judge.jsonl")
    count = sum(verdict is not None for verdict in verdicts)
    note = f"the judge {judge.model} gave a verdict on {count:,} of {len(rows):,} pairs of answers"
    if count < FEWEST:
        fix = "another judge: it has to answer with JSON"
        raise UserError(Problem("--judge", f"{note}, {FEWEST} are needed: {reason}", fix, judge.model))
    return [replace(row, preference=verdict) for row, verdict in zip(rows, verdicts, strict=True)], note


def _conversation(prompt: Prompt) -> str:
    """Return the text of a prompt; of several messages, each with its role."""
    if len(prompt.messages) == 1:
        return text_of(prompt.messages[0])
    return "\n\n".join(f"{message.get('role')}: {text_of(message)}" for message in prompt.messages)


# -- the report


def write(folder: Path, result: Result, kinds: Sequence[Kind]) -> None:
    """Write report.html and comparison.json, which only this user can read."""
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
            old_score, new_score = score(row)
            texts = {name: getattr(row, name)[:SHOWN] for name in ("prompt", "expected", "old", "new")}
            examples.append({"kind": kind.name, **texts, "old_score": old_score, "new_score": new_score})

    def order(example: Mapping[str, Any]) -> tuple[float, bool]:
        gain = example["new_score"] - example["old_score"]
        return -abs(gain), gain > 0

    return sorted(examples, key=order)[:EXAMPLES]
