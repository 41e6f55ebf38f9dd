"""`dstune serve --monitor RUN`: the newest result of `dstune monitor` as gauges, and as JSON for admins."""

from __future__ import annotations

import argparse
import datetime
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dstune.core.errors import Problem
from dstune.protocols import Routes, routes

if TYPE_CHECKING:
    from dstune.serve.gateway.app import Gateway, Route
    from dstune.serve.gateway.request import Request

VERDICTS = ("none", "drift", "undecided")


@routes
class MonitorRoutes(Routes):
    name = "monitor"
    title = ""
    closed = dict.fromkeys(("/admin/monitor",), "--monitor RUN")

    def __init__(self) -> None:
        self._runs: list[Path] = []

    def add_options(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "--monitor",
            action="append",
            default=[],
            type=Path,
            metavar="RUN",
            help="export the newest result of `dstune monitor RUN` in /metrics; may be repeated",
        )

    def is_served(self, arguments: argparse.Namespace) -> bool:
        return bool(arguments.monitor)

    def check(self, arguments: argparse.Namespace) -> Iterator[Problem]:
        for run in arguments.monitor:
            if not (run / "run.yaml").is_file():
                yield Problem("--monitor", "this folder holds no run (no run.yaml)", "give a run directory", str(run))

    def open(self, arguments: argparse.Namespace, state: Path, runtime: Path) -> None:
        self._runs = list(dict.fromkeys(run.resolve() for run in arguments.monitor))

    def routes(self, gateway: Gateway) -> Sequence[Route]:
        from dstune.serve.gateway.app import Route

        return [Route("GET", "/admin/monitor", self._show, scope="admin")]

    def attach(self, gateway: Gateway) -> None:
        gateway.metrics.add_collector(DriftGauges(self._runs))

    async def _show(self, gateway: Gateway, request: Request) -> None:
        from dstune.monitor.command import read_result

        await request.answer({"object": "list", "data": [read_result(run) for run in self._runs]})


class DriftGauges:
    """Exports the newest results as metrics. Results are read again at each scrape, since checks run in separate processes, by cron
    or a scheduler."""

    def __init__(self, runs: Sequence[Path]):
        self._names = _names(runs)

    def collect(self) -> Iterator[Any]:
        from prometheus_client.core import GaugeMetricFamily

        from dstune.monitor.command import read_result

        verdict = GaugeMetricFamily(
            "dstune_drift_verdict", "1 for the verdict of the newest check", labels=["run", "verdict"]
        )
        p_value = GaugeMetricFamily(
            "dstune_drift_corrected_p", "p-value, corrected for all signals and checks", labels=["run", "signal"]
        )
        effect = GaugeMetricFamily("dstune_drift_effect", "Effect size, see monitor.json", labels=["run", "signal"])
        checked = GaugeMetricFamily(
            "dstune_drift_checked_seconds", "Time of the newest check, in seconds since the epoch", labels=["run"]
        )
        for run, name in self._names.items():
            result = read_result(run)
            if result.get("verdict") not in VERDICTS:
                continue
            for verdict_name in VERDICTS:
                verdict.add_metric([name, verdict_name], float(result["verdict"] == verdict_name))
            for signal in _signals(result):
                p_value.add_metric([name, signal["name"]], float(signal["corrected_p"]))
                effect.add_metric([name, signal["name"]], float(signal["effect"]["value"]))
            checked.add_metric([name], datetime.datetime.fromisoformat(str(result["checked"])).timestamp())
        yield from (verdict, p_value, effect, checked)


def _names(runs: Sequence[Path]) -> dict[Path, str]:
    """Return the label of each run: the end of its path, as short as tells it from the other runs. Each run is listed once."""
    ends = {run: ["/".join(run.parts[-count:]) for count in range(1, len(run.parts) + 1)] for run in runs}
    count = Counter(end for names in ends.values() for end in names)
    return {run: next((end for end in names if count[end] == 1), str(run)) for run, names in ends.items()}


def _signals(result: dict[str, Any]) -> list[dict[str, Any]]:
    entries = result.get("signals")
    return [entry for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []
