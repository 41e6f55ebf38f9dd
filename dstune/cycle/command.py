"""The verb `dstune cycle`: runs a cycle, shows its state, and records a person's decisions."""

from __future__ import annotations

import getpass
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from dstune.core.arguments import VerbParser
from dstune.core.errors import EXIT_DONE, Problem, UserError
from dstune.cycle.ledger import Ledger
from dstune.cycle.registry import Registry
from dstune.cycle.settings import AutoPromote, CycleSettings, read_settings

ACTIONS = ("run", "status", "judge", "challenge", "promote", "rollback", "schedule")


def main(argv: list[str]) -> int:
    """Run `dstune cycle CONFIG [ACTION]`. Raises UserError, Preempted, TrainingFailed; returns the exit code."""
    arguments = _parser().parse_args(argv)
    if arguments.action != "schedule" and (arguments.scheduler or arguments.output):
        option = "--for" if arguments.scheduler else "--output"
        raise UserError(Problem(option, "only works with `schedule`", "dstune cycle CONFIG schedule --for cron"))
    settings = read_settings(arguments.config)
    if arguments.auto_promote:
        if arguments.action != "run":
            raise UserError(Problem("--auto-promote", "only works with `run`", "dstune cycle CONFIG --auto-promote"))
        settings = replace(settings, auto_promote=settings.auto_promote or AutoPromote())
    if arguments.action == "schedule":
        from dstune.cycle.schedule import write_schedule

        print(write_schedule(arguments.config, settings, arguments.scheduler or "cron", arguments.output))
        return EXIT_DONE
    if arguments.action == "status":
        _show(_status(settings), as_json=arguments.json)
        return EXIT_DONE
    from dstune.cycle.page import write_page
    from dstune.cycle.steps import Cycle, locked

    with locked(settings.folder):
        if arguments.action in ("run", "judge"):
            cycle = Cycle(settings, message=(lambda text: None) if arguments.json else _say)
            decision = cycle.run() if arguments.action == "run" else cycle.judge_again()
            result = {"decision": decision, **_status(settings)}
        else:
            result = _decide(settings, arguments.action, arguments.by or getpass.getuser(), arguments.reason)
        page = write_page(settings.folder, settings.alias)
    if arguments.json:
        print(json.dumps(result))
    else:
        if "decision" not in result:
            _show(result, as_json=False)
        print(f"page: {page}")
    return EXIT_DONE


def _say(text: str) -> None:
    print(text, flush=True)


def _parser() -> VerbParser:
    parser = VerbParser(
        prog="dstune cycle",
        description="Collect rows that people have labelled, corrected or accepted, train a candidate on them, judge it, and give "
        "it a share of the traffic.",
    )
    parser.add_argument(
        "config", type=Path, metavar="CONFIG", help="a YAML file: run, folder, data, gates (docs/cycle.md)"
    )
    parser.add_argument(
        "action",
        nargs="?",
        choices=ACTIONS,
        default="run",
        help="run (default) starts a cycle, or continues one that was interrupted; judge checks the challenger against the gates "
        "again, after rows were added; a person decides challenge (which gives it its share of the traffic), promote and rollback",
    )
    bounds = AutoPromote()
    parser.add_argument(
        "--auto-promote",
        action="store_true",
        help="promote without a person within the bounds of `auto_promote`; if CONFIG has none, promote if the gain on at least "
        f"{bounds.least_new_rows} new held-out rows exceeds {bounds.least_gain:g}",
    )
    parser.add_argument(
        "--by", metavar="NAME", help="who decides, as recorded in the ledger (default: your user name on this machine)"
    )
    parser.add_argument("--reason", default="", metavar="TEXT", help="the reason, as recorded in the ledger")
    parser.add_argument(
        "--for",
        dest="scheduler",
        choices=("cron", "slurm", "databricks"),
        help="with `schedule`: the scheduler that runs the cycles (default: cron)",
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="with `schedule`: the file to write")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def _decide(settings: CycleSettings, action: str, by: str, reason: str) -> dict[str, Any]:
    """Give the challenger its share, promote it, or roll back; record the decision and return the status. Raises UserError."""
    registry, ledger = Registry.read(settings.folder), Ledger(settings.folder)
    number = max((version["cycle"] for version in registry.versions.values()), default=0)
    version_before = None
    if action == "challenge":
        version = registry.challenge(settings.alias, settings.share)
    elif action == "promote":
        version = registry.promote(settings.alias)
    else:
        version_before, version = registry.roll_back(settings.alias)
    registry.write()
    ledger.append(number, action, version, reason or "no reason given", by=by, before=version_before)
    return _status(settings)


def _status(settings: CycleSettings) -> dict[str, Any]:
    registry, ledger = Registry.read(settings.folder), Ledger(settings.folder)
    return {
        "current": registry.current,
        "challenger": registry.challenger,
        "versions": registry.versions,
        "aliases": registry.aliases,
        "ledger": ledger.lines[-10:],
    }


def _show(status: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(status))
        return
    for name, version in status["versions"].items():
        deleted = "  holds deleted rows" if version.get("holds_forgotten") else ""
        print(f"{name:<6} {version['status']:<10} from {version['parent'] or version['run']}{deleted}")
    for alias, shares in status["aliases"].items():
        print(f"{alias}: {', '.join(f'{name} {share:.0%}' for name, share in shares.items())}")
    for line in status["ledger"]:
        print(f"  cycle {line['cycle']} {line['step']}: {line['decision']}: {line['reason']}")
