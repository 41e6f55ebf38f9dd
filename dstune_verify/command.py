"""The command line."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dstune_verify import certificate, script, user
from dstune_verify.cases import CRASHED, NOT_RUN, RIGHT, WRONG, Case, Outcome
from dstune_verify.catalogue import all_cases
from dstune_verify.options import Options
from dstune_verify.runner import Runner
from dstune_verify.training import TrainingCase
from dstune_verify.verdict import Verdict, line_of, visible
from dstune_verify.world import LauncherError, Place, device_count, device_type, place_from

EXIT_RIGHT, EXIT_WRONG, EXIT_USAGE, EXIT_NOT_RUN = 0, 1, 2, 3


class UsageError(Exception):
    """The command line, or a file that it names, is wrong."""


def main(argv: Sequence[str], certificates: Path | None = None) -> int:
    """Run the program and return its exit code.

    certificates: a folder for the certificates of all cases and of `--short`.
    """
    parser = make_parser()
    arguments = parser.parse_args(argv)
    try:
        place = place_from(os.environ)
        options = read_options(arguments)
        cases = choose(list_cases(options), arguments)
        check_numbers(arguments)
    except (LauncherError, UsageError) as error:
        print(visible(f"dstune-verify: {error}"), file=sys.stderr)
        return EXIT_USAGE
    verdict = judge(cases, options, place, ranks=arguments.ranks, seconds=arguments.time_limit or 0)
    if place is not None and place.rank > 0:
        return exit_code(verdict.outcomes)
    content = certificate.make(verdict.as_json(), form_of(arguments, options))
    print(json.dumps(content) if arguments.json else verdict.as_text(), flush=True)
    try:
        write_certificates(content, arguments.certificate, certificates)
        if arguments.scripts is not None:
            write_scripts(verdict, arguments.scripts)
    except OSError as error:
        print(f"dstune-verify: a file cannot be written: {error}", file=sys.stderr)
        return EXIT_USAGE
    return exit_code(verdict.outcomes)


def write_scripts(verdict: Verdict, folder: Path) -> None:
    """Write a script for each wrong training case. Raises OSError."""
    for outcome in verdict.outcomes:
        case = verdict.cases[outcome.case]
        if outcome.status == WRONG and isinstance(case, TrainingCase) and (file := script.write(folder, case)):
            print(f"script: {file}", file=sys.stderr, flush=True)


def form_of(arguments: argparse.Namespace, options: Options) -> str:
    """Return which cases ran."""
    if options.any or arguments.cases:
        return certificate.CHOSEN
    return certificate.SHORT if arguments.short else certificate.FULL


def write_certificates(content: dict[str, Any], file: Path | None, folder: Path | None) -> None:
    """Write a certificate into the file that the user named, and into the folder of certificates. Raises OSError."""
    written = []
    if file is not None:
        certificate.write(file, content)
        written.append(file)
    if folder is not None and content["form"] != certificate.CHOSEN:
        written.append(certificate.store(folder, content))
    for path in written:
        print(f"certificate: {path}", file=sys.stderr, flush=True)


def judge(
    cases: Sequence[Case],
    options: Options,
    place: Place | None,
    *,
    ranks: int = 0,
    seconds: float = 0,
    store: str | None = None,
) -> Verdict:
    """Run the cases on all ranks and return the verdict; every agent gets the same. Progress goes to stderr.

    ranks: how many to start if no launcher did; 0 for one on each device, or two on a CPU. seconds: limit of a case, 0 for its own.
    store: a file through which agents on one machine agree, in place of the place's address.
    """
    device = device_type()
    ranks = ranks or (2 if device == "cpu" else max(device_count(device), 1))
    reasons = {case.name: case.missing(device) for case in cases}
    outcomes = [Outcome(name, NOT_RUN, reason) for name, reason in reasons.items() if reason]
    runnable = [case for case in cases if not reasons[case.name]]
    runner = Runner(place, ranks, seconds=seconds, options=options, store=store)
    for outcome in runner.run(runnable):
        outcomes.append(outcome)
        if runner.agents.index == 0:
            print(f"[{len(outcomes)}/{len(cases)}] {line_of(outcome)}", file=sys.stderr, flush=True)
    order = [case.name for case in cases]
    outcomes.sort(key=lambda outcome: order.index(outcome.case))
    return Verdict(outcomes, {case.name: case for case in cases}, runner.size)


def exit_code(outcomes: Sequence[Outcome]) -> int:
    """Return 1 if a case is wrong, 3 if one could not be completed or none ran, else 0."""
    statuses = {outcome.status for outcome in outcomes}
    if WRONG in statuses:
        return EXIT_WRONG
    return EXIT_NOT_RUN if CRASHED in statuses or RIGHT not in statuses else EXIT_RIGHT


def choose(cases: dict[str, Case], arguments: argparse.Namespace) -> list[Case]:
    """Return the cases that the command line chooses. Raises UsageError."""
    chosen = [case for case in cases.values() if case.short or not arguments.short]
    parts = [part for text in arguments.cases for part in text.split(",")]
    for part in parts:
        if not any(part in case.name for case in chosen):
            raise UsageError(f"no case has {part} in its name; --list prints them")
    return [case for case in chosen if not parts or any(part in case.name for part in parts)]


def list_cases(options: Options) -> dict[str, Case]:
    """Return all cases by name. Raises UsageError for a DeepSpeed configuration that is wrong."""
    try:
        return all_cases(options)
    except user.ConfigurationError as error:
        raise UsageError(f"--deepspeed: {error}") from None


def check_numbers(arguments: argparse.Namespace) -> None:
    """Raise UsageError for numbers out of range."""
    if arguments.ranks is not None and arguments.ranks < 1:
        raise UsageError("--ranks: must be at least 1")
    if arguments.time_limit is not None and not arguments.time_limit > 0:
        raise UsageError("--time-limit: must be above 0")


def read_options(arguments: argparse.Namespace) -> Options:
    """Return what the user wants verified. Raises UsageError."""
    try:
        config = user.read_json(arguments.deepspeed, "a DeepSpeed configuration") if arguments.deepspeed else None
        model = arguments.model / "config.json" if arguments.model and arguments.model.is_dir() else arguments.model
        network = user.read_json(model, "a model's config.json") if model else None
        return Options(config, network, arguments.lora, arguments.precision or "")
    except user.ConfigurationError as error:
        raise UsageError(str(error)) from None


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="dstune-verify", description="Check whether the installed training stack computes the right gradients."
    )
    parser.add_argument("--short", action="store_true", help="only the cases of known faults, in under 30 s")
    parser.add_argument(
        "--cases", action="append", default=[], metavar="PART", help="only cases whose name has this part"
    )
    parser.add_argument(
        "--deepspeed", type=Path, metavar="DS.JSON", help="verify the settings of this DeepSpeed file instead"
    )
    parser.add_argument("--model", type=Path, metavar="PATH", help="verify this model: its config.json, shrunken")
    parser.add_argument("--lora", action="store_true", help="verify training of LoRA adapters")
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16"), help="verify this precision")
    parser.add_argument("--ranks", type=int, metavar="N", help="ranks to start if no launcher does")
    parser.add_argument("--time-limit", type=float, metavar="SECONDS", help="limit of a case")
    parser.add_argument(
        "--certificate", type=Path, metavar="FILE", help="write the certificate, which can be sent, to FILE"
    )
    parser.add_argument(
        "--scripts",
        type=Path,
        metavar="FOLDER",
        help="write a script for each wrong case, which shows it without this program",
    )
    parser.add_argument("--json", action="store_true", help="print the certificate as one JSON object")
    parser.add_argument("--local_rank", "--local-rank", type=int, default=0, help=argparse.SUPPRESS)
    return parser
