#!/usr/bin/env python3
"""Give every parser of foreign text made-up and damaged inputs: none may raise what is no message, or take more than 2 s.

usage: python benchmarks/fuzz.py [--inputs 200000] [--only NAME,NAME] [--seed 0] [--output fuzz.jsonl] [--list]

Inputs are valid examples with parts replaced, removed or cut, and values of any shape; hypothesis draws them from the seed, and
makes what fails as small as it can. The output has
a line for each round of ROUND inputs; a run that is started again with it goes on behind the last one. A round is a
process, so that a crash is a finding too. Exit code 1: something was found (each finding with its input, to be kept as
a case in tests/security/test_fuzz.py).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import signal
import sys
import tempfile
import traceback
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # as a script it finds its own folder only

from benchmarks.fuzz_parsers import Parser, parsers, prepare

ROUND = 500
SECONDS = 2.0
"""Processor time for one input."""
HANGS_SECONDS = 20
"""After which an input is given up."""


class TooSlow(BaseException):
    """No Exception, which a parser might catch."""


class Slow(Exception):
    """An input takes more than SECONDS."""


# ---- running ----


@dataclass
class Finding:
    parser: str
    error: str
    place: str
    given: str


class Measured:
    """A parser that notes what goes wrong before hypothesis sees it and makes the input smaller."""

    def __init__(self, parser: Parser, root: Path):
        self.parser, self.root = parser, root
        self.findings: dict[str, Finding] = {}
        self.inputs = 0
        self.slowest = 0.0

    def __call__(self, value: Any) -> None:
        self.inputs += 1
        (self.root / "input").write_text(repr(value)[:3000], errors="replace")
        seconds = self._parse(value)
        # Once more: the first one that comes so far imports what it needs.
        if self.inputs == 1 or seconds > SECONDS / 4:
            seconds = self._parse(value)
        self.slowest = max(self.slowest, seconds)
        if seconds > SECONDS:
            self.note(f"slow: {seconds:.1f} s", value, "")
            raise Slow

    def _parse(self, value: Any) -> float:
        """Return seconds of the processor."""
        with tempfile.TemporaryDirectory(dir=self.root) as folder:
            began = spent()
            try:
                signal.signal(signal.SIGALRM, _give_up)
                signal.alarm(HANGS_SECONDS * 6)
                self.parser.parse(value, Path(folder))
            except self.parser.allowed:
                pass
            except Exception as error:
                self.note(f"{type(error).__name__}: {str(error)[:200]}", value, _place(error))
                raise
            except TooSlow as error:
                self.note(f"TooSlow: {error}", value, _place(error))
                raise Slow from None
            finally:
                signal.alarm(0)
        return spent() - began

    def note(self, error: str, value: Any, place: str) -> None:
        self.findings[place or error[:4]] = Finding(self.parser.name, error, place, repr(value)[:3000])


def spent() -> float:
    """Return processor time of this process and its children that have ended."""
    both = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in both)


def _give_up(number: int, frame: Any) -> None:
    raise TooSlow(f"not done after {HANGS_SECONDS * 6} s")


def _place(error: BaseException) -> str:
    """Return the last line of dstune in a traceback."""
    own_frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "/dstune/" in frame.filename]
    return (
        f"{Path(own_frames[-1].filename).name}:{own_frames[-1].lineno} {own_frames[-1].name}"
        if own_frames
        else "elsewhere"
    )


def fuzz(parser: Parser, inputs: int, number: int, root: Path) -> dict[str, Any]:
    """Run a round in a process of its own: `inputs` inputs that follow from `number`."""
    answer = root / "answer.json"
    answer.unlink(missing_ok=True)
    child = os.fork()
    if child == 0:
        try:
            measured = _round(parser, inputs, number, root)
            findings = [vars(finding) for finding in measured.findings.values()]
            answer.write_text(
                json.dumps({"inputs": measured.inputs, "slowest": measured.slowest, "findings": findings})
            )
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(0)
    _, status = os.waitpid(child, 0)
    if answer.exists():
        result: dict[str, Any] = json.loads(answer.read_text())
        return result
    last = (root / "input").read_text(errors="replace") if (root / "input").exists() else ""
    crash = Finding(parser.name, f"the process ended: {os.waitstatus_to_exitcode(status)}", "", last)
    return {"inputs": inputs, "slowest": 0.0, "findings": [vars(crash)]}


def _round(parser: Parser, inputs: int, number: int, root: Path) -> Measured:
    measured = Measured(parser, root)

    @seed(number)
    @settings(
        max_examples=inputs,
        phases=(Phase.generate, Phase.shrink),
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(parser.inputs)
    def each(example: Any) -> None:
        measured(example)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            each()
        except Exception:
            if not measured.findings:
                raise
    return measured


def scratch() -> Path | None:
    """Return a file system in memory, where there is one."""
    place = Path("/dev/shm")
    return place if os.access(place, os.W_OK) else None


def main(argv: list[str]) -> int:
    parser_by_name = parsers()
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--inputs", type=int, default=200_000, help="over all parsers")
    arguments.add_argument("--only", default="", help="names of parsers")
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--output", type=Path, default=Path("fuzz.jsonl"))
    arguments.add_argument("--list", action="store_true")
    requested = arguments.parse_args(argv)
    chosen = (
        [parser_by_name[name] for name in requested.only.split(",")]
        if requested.only
        else list(parser_by_name.values())
    )
    if requested.list:
        print("\n".join(chosen_parser.name for chosen_parser in chosen))
        return 0
    prepare()
    done: dict[str, int] = {}
    rounds: dict[str, int] = {}
    if requested.output.exists():
        for line in requested.output.read_text().splitlines():
            row = json.loads(line)
            done[row["parser"]] = done.get(row["parser"], 0) + row["inputs"]
            rounds[row["parser"]] = rounds.get(row["parser"], 0) + 1
    weight = sum(chosen_parser.weight for chosen_parser in chosen)
    wanted = {
        chosen_parser.name: math.ceil(requested.inputs * chosen_parser.weight / weight) for chosen_parser in chosen
    }
    finding_count = 0
    with tempfile.TemporaryDirectory(dir=scratch()) as root, requested.output.open("a") as output:
        # A round of each in turn, so that a run that is cut short has seen all of them.
        while unfinished := [
            chosen_parser for chosen_parser in chosen if done.get(chosen_parser.name, 0) < wanted[chosen_parser.name]
        ]:
            for parser in unfinished:
                number = rounds.get(parser.name, 0)
                count = min(ROUND, wanted[parser.name] - done.get(parser.name, 0))
                answer = fuzz(parser, count, requested.seed + number, Path(root))
                done[parser.name] = done.get(parser.name, 0) + answer["inputs"]
                rounds[parser.name] = number + 1
                finding_count += len(answer["findings"])
                print(json.dumps({"parser": parser.name, "round": number, **answer}), file=output, flush=True)
                counts = (
                    f"{answer['inputs']} inputs, slowest {answer['slowest']:.2f} s, {len(answer['findings'])} findings"
                )
                print(f"{sum(done.values()):>7} {parser.name}: {counts}", flush=True)
                for finding in answer["findings"]:
                    print(
                        f"    {finding['error']}\n      {finding['place']}\n      {finding['given'][:300]}", flush=True
                    )
    return 1 if finding_count else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
