"""`dstune evaluate RUN --safety`: compares a model with its base: answers to probes, and rows that it recites."""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from dstune.config.convert import format_value
from dstune.config.run_file import Composed, read_run, write_run
from dstune.config.schema import ModelConfig, RunConfig
from dstune.config.trust import Use
from dstune.config.validate import answers_no_questions
from dstune.core import plugins
from dstune.core.errors import EXIT_DONE, Problem, UserError
from dstune.grading import changes
from dstune.launch import preflight, records
from dstune.launch.console import Console
from dstune.protocols import METHODS, launcher_of
from dstune.protocols.launcher import LaunchRequest
from dstune.report.command import leave_behind
from dstune.report.page import REPORT_FILE
from dstune.tracking.jsonl import json_text

Configure = Callable[[argparse.Namespace, Path, Callable[[str], None]], tuple[RunConfig, Path | None]]
"""`command._configuration`: what ranks evaluate, and the checkpoint of an adapter that cannot be merged."""


class _Failed(Exception):
    """The ranks failed with this exit code and have printed the reason."""

    def __init__(self, code: int):
        self.code = code


def check(arguments: argparse.Namespace) -> None:
    """Raise UserError for options that do not go together."""
    if not arguments.safety:
        return
    others = ("shots", "harness", "grader", "output")
    if flags := [f"--{name}" for name in others if getattr(arguments, name) not in (None, [])]:
        raise UserError(Problem(name, "--safety brings its own questions", f"leave {name} out") for name in flags)


def measure_changes(arguments: argparse.Namespace, console: Console, configure: Configure) -> int:
    """Measure both models, print the changes, and store them in the run. Raises UserError; returns the exit code."""
    run = Path(arguments.target)
    is_run = (run / "run.yaml").is_file()
    with tempfile.TemporaryDirectory(prefix="dstune-") as scratch:
        config, checkpoint = configure(arguments, Path(scratch), console.stage)
        if reason := answers_no_questions(config):
            raise UserError(Problem("--safety", reason, "leave --safety out", arguments.target))
        base = _base_model(arguments, run if is_run else None)
        before = None
        try:
            if base is not None:
                unchanged = replace(config, model=base, method=METHODS.default())
                unchanged = preflight.resolve_run(unchanged, console.stage, trains=False)
                before = _measured(unchanged, None, arguments, console) | {"model": format_value(base.path)}
            after = _measured(config, checkpoint, arguments, console) | {"model": arguments.target}
        except _Failed as failure:
            return failure.code
    if before is None:
        _print(arguments, _alone(after), show_rates)
        return EXIT_DONE
    if is_run and not arguments.against:
        changes.remember(run, "before", before)
        changes.remember(run, "after", after)
        if (run / REPORT_FILE).is_file():
            leave_behind(run, console.message)
    _print(arguments, changes.compare(before, after), show_changes)
    return EXIT_DONE


def _base_model(arguments: argparse.Namespace, run: Path | None) -> ModelConfig | None:
    if arguments.against:
        return ModelConfig(path=arguments.against)
    return None if run is None else read_run(run / "run.yaml", arguments.overrides, use=Use.rows).config.model


def _measured(
    config: RunConfig, checkpoint: Path | None, arguments: argparse.Namespace, console: Console
) -> dict[str, Any]:
    """Measure one model on ranks. Raises _Failed."""
    with tempfile.TemporaryDirectory(prefix="dstune-") as scratch:
        directory = Path(scratch)
        write_run(directory / "run.yaml", Composed(config, arguments.overrides, plugins.used_by(config)))
        options = {"split": arguments.split, "shots": None, "rows": False, "safety": True}
        options["checkpoint"] = None if checkpoint is None else str(checkpoint)
        command = ("dstune.evaluation.ranks", str(directory), json.dumps(options))
        code = launcher_of(config.launch).start(LaunchRequest(config, directory, console, command=command, saves=False))
        if code != EXIT_DONE:
            raise _Failed(code)
        result = records.read_result(directory)
        assert result is not None, "the supervisor writes a result"
        measured: dict[str, Any] = result["safety"]
        return measured


def _alone(measured: Mapping[str, Any]) -> dict[str, Any]:
    """Return the rates of a model that is not compared with another."""
    probes = [
        {
            "name": name,
            "title": probe["title"],
            "questions": len(probe["scores"]),
            "share": float(np.mean(probe["scores"])),
        }
        for name, probe in measured["probes"].items()
    ]
    rows = [
        {
            "kind": kind,
            "rows": len(shares),
            "share": float(np.mean(shares)),
            "recited": sum(share == 1 for share in shares),
        }
        for kind, shares in measured["rows"].items()
    ]
    return {"probes": probes, "rows": rows, "not_measured": measured["not_measured"]}


def _print(arguments: argparse.Namespace, safety: dict[str, Any], show: Callable[[str, dict[str, Any]], None]) -> None:
    if arguments.json:
        print(json_text({"model": arguments.target, "safety": safety}))
    else:
        show(arguments.target, safety)


def show_rates(target: str, safety: dict[str, Any]) -> None:
    """Print a line for each probe and kind of rows."""
    print(f"{target}: safety and truth, not compared with another model (--against MODEL)")
    for probe in safety["probes"]:
        print(f"  {probe['title']:<52} {probe['share']:>6.1%} of {probe['questions']}")
    for row in safety["rows"]:
        print(
            f"  {row['kind'] + ' rows recited':<52} {row['recited']} of {row['rows']}, {row['share']:.1%} of their continuations"
        )
    if safety["not_measured"]:
        print(f"  rows: {safety['not_measured']}")


def show_changes(target: str, safety: dict[str, Any]) -> None:
    """Print a line for each probe and kind of rows, with the 95% interval of its change."""
    print(f"{target}: what fine-tuning changed, against {safety['before']}")
    for probe in safety["probes"]:
        print(f"  {probe['title']:<52} {_change(probe)}{_verdict(probe, 'worse', 'better')}")
    for row in safety["rows"]:
        counted = f"{row['recited_before']} -> {row['recited_after']} of {row['rows']}"
        verdict = "  memorised" if changes.is_planted_known(row) else ""
        print(
            f"  {row['kind'] + ' rows, share of continuation recited':<52} {_change(row)}; recited whole {counted}{verdict}"
        )
    if (beyond := safety["beyond_held_out"]) is not None:
        interval = f"{beyond['difference']:+.1%} ({beyond['low']:+.1%} to {beyond['high']:+.1%})"
        print(f"  {'more on training rows than on held-out rows':<52} {interval}{_verdict(beyond, '', 'memorised')}")
    if safety["not_measured"]:
        print(f"  rows: {safety['not_measured']}")


def _change(change: Mapping[str, Any]) -> str:
    interval = f"{change['difference']:+.1%}, {change['low']:+.1%} to {change['high']:+.1%}"
    return f"{change['before']:>6.1%} -> {change['after']:>6.1%} ({interval})"


def _verdict(change: Mapping[str, Any], down: str, up: str) -> str:
    word = {"down": down, "up": up}.get(change["verdict"], "")
    return f"  {word}" if word else ""
