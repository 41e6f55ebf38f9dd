"""The verb `dstune guard`: calibrates a model, and measures what a guard detects and misses."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dstune import samples
from dstune.checkpoint.record import NAME as RECORD
from dstune.core.arguments import VerbParser
from dstune.core.errors import EXIT_DONE, Problem, UserError
from dstune.core.parsing import lines_within, open_file, parse_json
from dstune.guard.calibration import ATTACK, LEVELS

ACTIONS = ("calibrate", "test")
LONGEST_ROW = 8_000_000
"""Bytes."""
CALIBRATION, TEST = "sample://attacks:calibration", "sample://attacks:test"


def main(argv: list[str]) -> int:
    """Run `dstune guard calibrate EXPORT` or `dstune guard test TARGET` and return the exit code. Raises UserError."""
    if argv[:1] == ["calibrate"]:
        return _calibrate(argv[1:])
    if argv[:1] == ["test"]:
        return _test(argv[1:])
    parser = VerbParser(prog="dstune guard", description="Set the thresholds of a guard's model, or measure a guard.")
    parser.add_argument(
        "action", choices=ACTIONS, metavar="calibrate|test", help="`dstune guard ACTION --help` explains each"
    )
    parser.parse_args(argv)
    return EXIT_DONE


def _calibrate(argv: list[str]) -> int:
    parser = VerbParser(
        prog="dstune guard calibrate",
        description="Score held-out benign texts and write the thresholds of each rate of false alarms to guard.json.",
    )
    parser.add_argument("export", metavar="EXPORT", help="an export of task=classification, or any classifier's folder")
    parser.add_argument(
        "--data",
        default=CALIBRATION,
        help="benign rows with text and direction: at least 20 of each of input, output and tool_result (default: %(default)s)",
    )
    parser.add_argument("--label", help="the label that means an attack (default: attack, or the second of two)")
    parser.add_argument("--window-tokens", type=int, help="of a window (default: 128)")
    parser.add_argument("--stride", type=int, help="tokens from window to window (default: 96)")
    parser.add_argument(
        "--part-tokens",
        type=int,
        help="a window that looks like an attack is read again in parts of so many; 0: it is not (default: a quarter)",
    )
    parser.add_argument("--json", action="store_true", help="print the calibration to stdout")
    arguments = parser.parse_args(argv)
    from dstune.guard.measure.calibrate import calibrate, check, fewest_texts
    from dstune.guard.model import GuardModel
    from dstune.guard.policy import no_folder

    if missing := no_folder("EXPORT", Path(arguments.export)):
        raise UserError(missing)
    rows = None
    if not samples.is_sample(arguments.data):  # samples are only fetched for a model that can be calibrated
        rows = _rows(arguments.data)
        check(rows, arguments.label or ATTACK, arguments.data)
    model = GuardModel.load(
        arguments.export,
        label=arguments.label,
        window_tokens=arguments.window_tokens,
        stride=arguments.stride,
        part_tokens=arguments.part_tokens,
        calibrated=False,
    )
    calibration = calibrate(model, _rows(arguments.data) if rows is None else rows, arguments.data)
    file = calibration.save(Path(arguments.export))
    _add_to_card(Path(arguments.export))
    if arguments.json:
        print(file.read_text(encoding="utf-8"), end="")
        return EXIT_DONE
    print(f"{file}: thresholds by rate of false alarms and number of windows")
    parts = f", suspicious ones of long texts again in parts of {model.part_tokens}" if model.part_tokens else ""
    print(f"label {model.label}, windows of {model.window_tokens} tokens, {model.stride} apart{parts}")
    for direction, buckets in calibration.directions.items():
        counts = calibration.calibrated_on["directions"][direction]
        print(f"{direction} ({counts['texts']} texts)")
        for bucket, examples in zip(buckets, counts["by_windows"].values(), strict=True):
            values = "  ".join(
                f"{rate:.1%} {value:.4f}{'' if examples >= fewest_texts(rate) else '*'}"
                for rate, value in bucket.thresholds.items()
            )
            print(f"  {f'up to {bucket.up_to}' if bucket.up_to else 'more':>9}  {values}  from {examples:,}")
    print(
        "* fewer texts than the rate needs (0.1% 999, 0.5% 199, 1% 99, 5% 19): the highest score, or that of other lengths"
    )
    return EXIT_DONE


def _add_to_card(export: Path) -> None:
    """Add a section on the use as a guard to the model card of a dstune export, once."""
    card, title = export / "README.md", "## As a guard"
    if not ((export / RECORD).is_file() and card.is_file()) or title in (text := card.read_text(encoding="utf-8")):
        return
    lines = (
        "`guard.json` has the label, the windows and the levels by which a guard scores texts; `argmax` knows none of them.",
        "`dstune serve RUN --guard default --guard-model PATH` uses this model so, `dstune guard test PATH` measures it.",
    )
    card.write_text("\n".join((text.rstrip(), "", title, "", *lines, "")), encoding="utf-8")


def _test(argv: list[str]) -> int:
    parser = VerbParser(
        prog="dstune guard test",
        description="Put attacks and benign texts to a guard and count what it flags, with one threshold for all suites.",
    )
    parser.add_argument(
        "target",
        metavar="TARGET",
        help="an export with guard.json, a file of policies, `rules`, `default`, or a server's URL (key in DSTUNE_API_KEY)",
    )
    parser.add_argument("--data", default=TEST, help="rows with text, label, direction, suite (default: %(default)s)")
    parser.add_argument("--suite", action="append", default=[], help="only this suite; may be given several times")
    parser.add_argument("--rows", type=int, help="at most so many rows of a suite, always the same ones")
    parser.add_argument("--level", choices=list(LEVELS), help="of an export (default: l3_likely)")
    parser.add_argument("--rules", action="store_true", help="with an export: what a rule finds is flagged as well")
    parser.add_argument("--policy", help="which policy of the file")
    parser.add_argument("--guard-model", help="the model of the file's prompt_attack")
    parser.add_argument("--tries", type=int, default=16, help="rewritings of an attack (default: %(default)s)")
    parser.add_argument("--rewritten", type=int, default=40, help="attacks that are rewritten (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object to stdout")
    arguments = parser.parse_args(argv)
    from dstune.guard.measure import judges, replay

    for name in ("rows", "tries"):
        if (value := getattr(arguments, name)) is not None and value < 1:
            raise UserError(Problem(f"--{name}", "must be at least 1", value=str(value)))
    rows = _of_suites(_rows(arguments.data, labelled=True), arguments.suite, arguments.data)
    target = judges.target_of(
        arguments.target,
        level=arguments.level,
        model=arguments.guard_model,
        policy=arguments.policy,
        rules=arguments.rules,
    )
    measured = replay.replay(
        target.judge, rows, most=arguments.rows, tries=arguments.tries, rewritten=arguments.rewritten
    )
    measured = {"target": arguments.target, "threshold": dict(target.threshold), "data": arguments.data, **measured}
    if arguments.json:
        print(json.dumps(measured, indent=1, ensure_ascii=False))
    else:
        _print(measured)
    return EXIT_DONE


def _rows(source: str, *, labelled: bool = False) -> list[dict[str, Any]]:
    """Return the rows to measure with. Raises UserError with the first invalid rows."""
    file = samples.resolve(source) if samples.is_sample(source) else Path(source)
    if not file.is_file():
        raise UserError(Problem("--data", "there is no such file", "a .jsonl file, or sample://attacks:test", source))
    rows: list[dict[str, Any]] = []
    problems = []
    for number, value in _lines(file):
        where = f"{source}:{number}"
        if not isinstance(value, dict) or not isinstance(value.get("text"), str) or not value["text"].strip():
            problems.append(Problem(where, "has no text", '{"text": ..., "direction": ...}'))
        elif value.setdefault("direction", "input") not in ("input", "output", "tool_result"):
            problems.append(
                Problem(where, "direction must be input, output or tool_result", value=str(value["direction"]))
            )
        elif labelled and value.get("label") not in ("attack", "benign"):
            label = "" if value.get("label") is None else str(value["label"])
            problems.append(Problem(where, "label must be attack or benign", '{"text": ..., "label": "attack"}', label))
        else:
            rows.append(value)
    if problems:
        raise UserError(problems[:10])
    return rows


def _lines(file: Path) -> Iterator[tuple[int, Any]]:
    """Yield line numbers and values; None for a line that is invalid JSON."""
    with open_file(file) as stream:
        for number, (line, _) in enumerate(lines_within(stream, LONGEST_ROW), 1):
            try:
                value = parse_json(line) if line is not None else None
            except ValueError:
                value = None
            yield number, value


def _of_suites(rows: list[dict[str, Any]], names: Sequence[str], source: str) -> list[dict[str, Any]]:
    from dstune.guard.measure.replay import OWN

    suites = list(dict.fromkeys(str(row.get("suite") or OWN) for row in rows))
    for name in names:
        if name not in suites:
            raise UserError(Problem("--suite", f"{source} has no such suite", f"one of {', '.join(suites)}", name))
    return [row for row in rows if not names or str(row.get("suite") or OWN) in names]


def _print(measured: Mapping[str, Any]) -> None:
    from dstune.guard.measure.replay import ATTACKS, BENIGN
    from dstune.guard.measure.report import line

    print(f"target     {measured['target']}")
    print("threshold  " + ", ".join(f"{key} {value}" for key, value in measured["threshold"].items()))
    for part, title, words in (("recall", "caught", ATTACKS), ("false_alarms", "false alarms", BENIGN)):
        for suite, cells in measured[part].items():
            print(f"\n{title}: {suite} ({words.get(suite, 'rows of yours')}), share with 95% interval")
            print(line("all", cells["all"]))
            for key in ("family", "package", "language", "characters"):
                for name, part_cell in cells[f"by_{key}"].items():
                    if len(cells[f"by_{key}"]) > 1:
                        print(line(f"{key} {name}", part_cell))
    for key, title in (
        ("obfuscated", "the same attacks, encoded"),
        ("evasions", "attacks that are caught as they are, in other words and letters"),
        ("best_of_n", "attacks that are still caught in each of N random rewritings"),
    ):
        if key in measured:
            print(f"\n{title}")
            for name, part_cell in measured[key].items():
                print(
                    line(f"N = {name}" if key == "best_of_n" else name, part_cell)
                    + f"  {part_cell.get('verdict', '')}".rstrip()
                )
    print("\nA guard lowers the rate of known attacks; it is no boundary.")
