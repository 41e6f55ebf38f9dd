"""The verb `dstune monitor`: compares live rows with those of a run, and reports one verdict."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dstune.core import files
from dstune.core.arguments import VerbParser
from dstune.core.errors import EXIT_DONE, Problem, UserError
from dstune.core.parsing import object_in
from dstune.launch.rundir import run_directory
from dstune.monitor import budget as budgets
from dstune.monitor.budget import FOLDER, Budget
from dstune.monitor.check import DRIFT, Check, Settings, Sides, iso, run_check
from dstune.monitor.conversations import digest_of
from dstune.monitor.gather import Live, Reference, gather_signals, read_live, read_reference
from dstune.monitor.row_files import READ_ROWS
from dstune.monitor.vectors import WORDS, embed

EXIT_DRIFT = 3
RESULT, PAGE = "monitor.json", "report.html"
BLIND_SPOTS = (
    "answers that have become wrong although the questions are as before: only labels, corrections and ratings show them",
    "changes of fewer rows than the power stated above can detect",
    "what the logs lack: failed requests, text beyond 16 turns or 8,000 characters of a turn, and what redaction masked",
    "dependence between conversations: they count as independent (--one-per user takes one conversation of each user)",
    "a change of the rows that leaves embeddings, lengths, languages and confidence as they were",
)


@dataclass(frozen=True)
class Outcome:
    """A check and its context."""

    check: Check
    live: Live
    reference: Reference
    vectors: str
    canaries: dict[str, Any] | None = None
    run: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return the outcome as JSON, without any text of rows."""
        result = self.check.to_json()
        clusters = [
            {
                "live_share": cluster.live_share,
                "reference_share": cluster.reference_share,
                "interval": [cluster.change.low, cluster.change.high],
                "words": list(cluster.words),
                "rows": [self.live.rows[number].place for number in cluster.examples],
            }
            for cluster in self.check.clusters
        ]
        return {
            "run": self.run,
            "checked": iso(time.time()),
            **result,
            "window": {"from": iso(self.live.begin), "to": iso(self.live.end)},
            "rows": {
                "live": len(self.live.rows),
                "reference": len(self.reference.rows),
                "validation": len(self.reference.validation),
                "window_before": len(self.live.earlier),
                "largest_user": self.live.largest_user,
                "live_left_out": self.live.left_out,
                "live_ahead_of_now": self.live.ahead_of_now,
                "reference_left_out": self.reference.left_out,
            },
            "versions": self.live.versions,
            "embeddings": self.vectors,
            "clusters": clusters,
            "canaries": self.canaries,
            "blind_spots": list(BLIND_SPOTS),
        }


def main(argv: list[str]) -> int:
    """Run `dstune monitor RUN --data LOGS` and return the exit code: 3 for drift with --fail-on-drift. Raises UserError."""
    arguments = _parser().parse_args(argv)
    check_numbers(arguments)
    run = run_directory(arguments.run)
    folder = run / FOLDER
    settings = Settings(arguments.alpha, arguments.checks, arguments.effect, streams=arguments.streams)
    if settings.streams:
        from dstune.monitor.streams import require_river

        require_river()
    canaries = _canaries(arguments)
    config = read_reference_config(run)
    live = read_live(
        arguments.data, arguments.window, config, store=arguments.store, per=arguments.one_per, most=arguments.rows
    )
    reference = read_reference(run, arguments.reference, arguments.rows, mask=live.from_server)
    records = budgets.read_checks(folder)
    rows = f"{digest_of(live.rows)} {digest_of(reference.rows)} {arguments.embeddings} {arguments.model_rows}"
    number = budgets.earlier_check(records, rows) or len({record.get("number") for record in records}) + 1
    outcome = compare(
        reference,
        live,
        Budget(settings.alpha, settings.checks, number),
        settings,
        embeddings=arguments.embeddings,
        run=run,
        model_rows=arguments.model_rows,
        canaries=canaries,
    )
    result = outcome.to_json()
    record = {"number": number, "rows": rows} | {
        key: result[key] for key in ("checked", "verdict", "reason", "signals", "window", "budget", "canaries")
    }
    budgets.note_check(folder, record)
    files.write(folder / RESULT, json.dumps(result, indent=1) + "\n")
    from dstune.monitor.page import page

    files.write(arguments.output or folder / PAGE, page(outcome, result, records))
    report(outcome, result, as_json=arguments.json)
    return exit_code(result, fails=arguments.fail_on_drift)


def compare(
    reference: Reference,
    live: Live,
    budget: Budget,
    settings: Settings,
    *,
    embeddings: str,
    run: Path | None = None,
    model_rows: int = 0,
    canaries: dict[str, Any] | None = None,
) -> Outcome:
    """Measure and test all signals. A changed canary is drift by itself, since nothing about it is random."""
    table = gather_signals(reference, live, run, model_rows)
    vectors = embed([*reference.rows, *live.rows], embeddings)
    check = run_check(Sides(reference.rows, live.rows, vectors, reference.name), table, budget, settings)
    if canaries and canaries["changed"]:
        check.verdict = DRIFT
        check.reason = f"{len(canaries['changed'])} of {canaries['asked']} canaries have another answer than before; {check.reason}"
    return Outcome(check, live, reference, embeddings, canaries, "" if run is None else str(run))


def exit_code(result: Mapping[str, Any], *, fails: bool) -> int:
    """Return the exit code. fails: whether drift is a failure."""
    return EXIT_DRIFT if fails and result["verdict"] == DRIFT else EXIT_DONE


def read_reference_config(run: Path) -> Any:
    """Return the configuration of a run, for reading its rows."""
    from dstune.config.run_file import read_run
    from dstune.config.trust import Use

    return read_run(run / "run.yaml", use=Use.rows).config


def _canaries(arguments: argparse.Namespace) -> dict[str, Any] | None:
    """Return the results of the canaries; None if there are none. Raises UserError."""
    if arguments.canaries is None:
        return None
    from dstune.monitor.canaries import ask_canaries, read_canaries

    canaries = read_canaries(arguments.canaries)
    if arguments.server is None or arguments.served_name is None:
        fix = "--server http://127.0.0.1:8000 --served-name NAME, as the server prints them"
        raise UserError(Problem("--canaries", "needs the server to ask", fix, str(arguments.canaries)))
    result = ask_canaries(canaries, arguments.server.rstrip("/").removesuffix("/v1"), arguments.served_name)
    return {"asked": result.count, "changed": list(result.changed)}


def _parser() -> VerbParser:
    parser = VerbParser(
        prog="dstune monitor",
        description="Compare live rows with the training and validation rows of a run: one verdict, within one error budget.",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory of the served model")
    parser.add_argument(
        "--data",
        required=True,
        metavar="LOGS",
        help="the state folder of a `dstune serve --log-requests` (its --state), or rows in any form of data.train: files, "
        "delta://PATH",
    )
    parser.add_argument(
        "--window", metavar="TIME", help="how far to look back: 12h, 7d (default for a server's logs), 2w"
    )
    parser.add_argument("--reference", metavar="FILE", help="compare with these rows instead of the run's own")
    parser.add_argument("--store", metavar="URL", help="the server's database, if it is not next to its logs")
    parser.add_argument("--one-per", choices=("user", "key"), help="use one conversation per user, or per key")
    add_test_options(parser)
    parser.add_argument(
        "--checks", type=int, default=12, metavar="N", help="number of checks that share the error budget (default 12)"
    )
    parser.add_argument(
        "--model-rows",
        type=int,
        default=1000,
        metavar="N",
        help="rows of each side on which the model's confidence is measured, and labelled live rows on which its loss is (default "
        "1000; 0 does not run the model)",
    )
    parser.add_argument(
        "--no-streams", dest="streams", action="store_false", help="do not look for a change within the window"
    )
    parser.add_argument(
        "--canaries", type=Path, metavar="FILE", help="prompts with the answers that the server must give"
    )
    parser.add_argument(
        "--server", metavar="URL", help="the server to send the canaries to; DSTUNE_API_KEY has a client's key"
    )
    parser.add_argument("--served-name", metavar="NAME", help="the name under which that server serves the model")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help=f"where to write the page (default RUN/{FOLDER}/{PAGE})"
    )
    return parser


def add_test_options(parser: argparse.ArgumentParser) -> None:
    """Add the options shared with `dstune data shift`."""
    parser.add_argument(
        "--embeddings",
        default=WORDS,
        metavar="MODEL",
        help="a model for task=embedding, such as sample://minilm; or `words` (default), which needs no model",
    )
    parser.add_argument(
        "--alpha",
        type=float,
        default=0.05,
        metavar="P",
        help="chance of a false alarm in all checks together (default 0.05)",
    )
    parser.add_argument(
        "--effect",
        type=float,
        default=0.2,
        metavar="SHARE",
        help="a move of this share of the rows to one topic should be detected; if there are too few rows for that, the verdict is "
        "`undecided` (default 0.2)",
    )
    parser.add_argument(
        "--rows",
        type=int,
        default=10_000,
        metavar="N",
        help="the most rows of each side that are compared (default 10000)",
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--fail-on-drift", action="store_true", help="exit with code 3 if there is drift")


def check_numbers(arguments: argparse.Namespace) -> None:
    """Raise UserError with every number that is out of range."""
    problems = []
    if not 0 < arguments.alpha < 0.5:
        problems.append(Problem("--alpha", "must be between 0 and 0.5", "--alpha 0.05", str(arguments.alpha)))
    if not 0 < arguments.effect <= 1:
        problems.append(Problem("--effect", "must be above 0 and at most 1", "--effect 0.2", str(arguments.effect)))
    for name, least in (("rows", 20), ("checks", 1), ("model_rows", 0)):
        value = getattr(arguments, name, least)
        if value < least:
            problems.append(Problem(f"--{name.replace('_', '-')}", f"must be at least {least}", value=str(value)))
    if arguments.rows > 50_000:
        reason = "must be at most 50000: more rows do not help"
        problems.append(Problem("--rows", reason, "--rows 50000", str(arguments.rows)))
    if getattr(arguments, "checks", 1) > 366:
        problems.append(Problem("--checks", "must be at most 366", value=str(arguments.checks)))
    if problems:
        raise UserError(problems)


def report(outcome: Outcome, result: Mapping[str, Any], *, as_json: bool) -> None:
    """Print the result. Only text for the screen includes examples of rows, JSON does not."""
    if as_json:
        print(json.dumps(result))
        return
    check = outcome.check
    rows = f"{len(outcome.live.rows):,} live conversations against {len(outcome.reference.rows):,} {outcome.reference.name}"
    print(f"{check.verdict}: {check.reason}\n{rows}")
    for option, left_out in (("--data", outcome.live.left_out), ("--reference", outcome.reference.left_out)):
        if left_out:
            print(f"{left_out:,} rows of {option} were left out: at most {READ_ROWS:,} conversations are read")
    if outcome.live.ahead_of_now:
        print(f"{outcome.live.ahead_of_now:,} rows of --data were left out: their time is ahead of now")
    print(f"  {'signal':<14} {'live':>7} {'reference':>9} {'p':>8} {'corrected':>9}  effect (95%)")
    for finding in sorted(check.findings, key=lambda finding: finding.corrected_p):
        effect = finding.effect
        size = f"{effect.name} {effect.value:.3f} ({effect.low:.3f} to {effect.high:.3f}) {effect.detail}"
        print(
            f"{'*' if finding.drifts else ' '} {finding.name:<14} {finding.live_rows:>7,} {finding.reference_rows:>9,} "
            f"{finding.p:>8.4f} {finding.corrected_p:>9.4f}  {size}"
        )
    print(f"corrected: for all signals and {check.budget.checks} checks; drift at {check.budget.alpha:g} or less")
    for name, reason in check.unmeasured.items():
        print(f"  {name}: not compared: {reason}")
    for change in check.streams:
        print(f"* {change.signal} changed at {iso(change.time)}: mean {change.before:.3g} -> {change.after:.3g}")
    if check.power is not None and check.power.can_alarm:
        power = check.power
        print(
            f"power: {power.power:.0%} for a move of {power.share:.0%} of the rows to one topic of the reference; "
            f"80% needs {power.rows_needed:,} rows on each side"
        )
    if check.since is not None:
        print(f"since: {iso(check.since)}")
    for cluster in check.clusters:
        print(f"topic: {cluster.reference_share:.1%} -> {cluster.live_share:.1%}  {' '.join(cluster.words)}")
        for number in cluster.examples[:3]:
            row = outcome.live.rows[number]
            print(f"    {row.place}: {' '.join(row.text.split())[:100]}")


def read_result(run: Path) -> dict[str, Any]:
    """Return the newest result of a run; empty if there is none."""
    return object_in(run / FOLDER / RESULT)
