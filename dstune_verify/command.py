"""The command line."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict

from dstune_verify.cases import CRASHED, NOT_RUN, RIGHT, WRONG, Outcome, all_cases
from dstune_verify.runner import Runner
from dstune_verify.world import LauncherError, device_count, device_type, place_from

EXIT_RIGHT, EXIT_WRONG, EXIT_USAGE, EXIT_NOT_RUN = 0, 1, 2, 3


def main(argv: Sequence[str]) -> int:
    """Run the program and return its exit code."""
    import os

    arguments = make_parser().parse_args(argv)
    try:
        place = place_from(os.environ)
    except LauncherError as error:
        print(f"dstune-verify: {error}", file=sys.stderr)
        return EXIT_USAGE
    device = device_type()
    cases = [case for case in all_cases().values() if case.short or not arguments.short]
    if arguments.cases:
        wanted = [name for pattern in arguments.cases for name in pattern.split(",")]
        cases = [case for case in cases if any(name in case.name for name in wanted)]
    main_agent = place is None or place.rank == 0
    outcomes = [Outcome(case.name, NOT_RUN, case.missing(device)) for case in cases if case.missing(device)]
    runnable = [case for case in cases if not case.missing(device)]
    ranks = arguments.ranks or max(device_count(device), 1 if device != "cpu" else 2)
    count = len(runnable)

    def show(outcome: Outcome) -> None:
        print(f"{outcome.status:8} {outcome.case} {outcome.detail}", file=sys.stderr, flush=True)

    runner = Runner(place, ranks, seconds=arguments.time_limit)
    for outcome in runner.run(runnable):
        outcomes.append(outcome)
        if main_agent:
            show(outcome)
    if main_agent and arguments.json:
        print(json.dumps({"cases": [asdict(outcome) for outcome in outcomes], "count": count}))
    statuses = {outcome.status for outcome in outcomes}
    if WRONG in statuses:
        return EXIT_WRONG
    return EXIT_NOT_RUN if CRASHED in statuses or RIGHT not in statuses else EXIT_RIGHT


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="dstune-verify", description="Whether the installed training stack computes the right gradients."
    )
    parser.add_argument("--short", action="store_true", help="only the cases of known faults, under 30 s")
    parser.add_argument(
        "--cases", action="append", default=[], metavar="PART", help="only cases whose name has this part"
    )
    parser.add_argument("--ranks", type=int, default=0, help="ranks to start if no launcher does")
    parser.add_argument("--time-limit", type=float, default=0, metavar="SECONDS", help="limit of a case")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--local_rank", "--local-rank", type=int, default=0, help=argparse.SUPPRESS)
    return parser
