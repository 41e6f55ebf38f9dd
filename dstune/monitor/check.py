"""Runs one check: all signals of reference and live conversations, with one verdict within one error budget."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from dstune.monitor import signals as reading
from dstune.monitor.budget import Budget
from dstune.monitor.clusters import Cluster, grown_clusters, moment_of_change
from dstune.monitor.conversations import Conversation
from dstune.monitor.effects import Effect
from dstune.monitor.power import WANTED, Power, estimate_power
from dstune.monitor.signals import CLASSIFIER, EMBEDDINGS, Signal, SignalTable
from dstune.monitor.streams import Change, find_change
from dstune.monitor.two_sample import JointTest, MeanDiscrepancy, test_jointly

NONE, DRIFT, UNDECIDED = "none", "drift", "undecided"
FEWEST_PERMUTATIONS, ENOUGH_PERMUTATIONS, MOST_PERMUTATIONS = 999, 19_999, 299_999
RESOLUTION = 10
"""Permutations expected to exceed the observed statistic at a family's level: fewer would make the level coarse. Beyond
ENOUGH_PERMUTATIONS there may be fewer, but always enough that a statistic can reach the level."""
REFERENCE = "training and validation rows"


@dataclass(frozen=True)
class Settings:
    """Settings of a check's decision."""

    alpha: float = 0.05
    """Chance of a false alarm within `checks` checks."""
    checks: int = 12
    share: float = 0.2
    """The share of the live rows for which the power is stated: how surely a move of so many to one topic would be detected."""
    least_effect: float = 0.02
    """The least effect that counts, as a share of the rows: a difference is no drift if its whole interval is below, however
    significant it is."""
    streams: bool = True
    seed: int = 0


@dataclass(frozen=True)
class Sides:
    """The two sides of a check: conversations and their vectors, reference rows first."""

    reference: Sequence[Conversation]
    live: Sequence[Conversation]
    vectors: np.ndarray
    against: str = REFERENCE

    @property
    def is_live(self) -> np.ndarray:
        return np.arange(len(self.vectors)) >= len(self.reference)


@dataclass(frozen=True)
class Finding:
    """The result for one signal."""

    name: str
    against: str
    live_rows: int
    reference_rows: int
    p: float
    corrected_p: float
    """Corrected for all signals and all checks, to be compared with the budget's `alpha`."""
    effect: Effect
    drifts: bool
    psi: float | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"effect": self.effect.to_json()}


@dataclass
class Check:
    """The result of a check."""

    verdict: str
    reason: str
    budget: Budget
    permutations: int
    findings: list[Finding]
    unmeasured: dict[str, str]
    streams: list[Change]
    power: Power | None
    since: float | None = None
    clusters: list[Cluster] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        power = None if self.power is None else asdict(self.power)
        return {
            "verdict": self.verdict,
            "reason": self.reason,
            "budget": self.budget.to_json() | {"permutations": self.permutations},
            "signals": [finding.to_json() for finding in self.findings],
            "unmeasured": self.unmeasured,
            "streams": [asdict(change) | {"time": iso(change.time)} for change in self.streams],
            "power": power,
            "since": iso(self.since),
        }


def iso(seconds: float | None) -> str | None:
    """Return a time as ISO text, in UTC."""
    if seconds is None:
        return None
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).isoformat(timespec="seconds")


def run_check(sides: Sides, table: SignalTable, budget: Budget, settings: Settings) -> Check:
    """Test every signal and reach a verdict. table: the signals other than the vectors, which are added here."""
    table.add(EMBEDDINGS, sides.against, *np.split(sides.vectors, [len(sides.reference)]))
    families = table.families()
    stream_values = _stream_values(sides, families) if settings.streams else {}
    permutations = 0
    findings: list[Finding] = []
    power = None
    level = budget.for_family(max(1, len(families)), with_streams=bool(stream_values))
    for number, family in enumerate(families):
        tested, statistics = _test(family, level, settings.seed + number)
        permutations = max(permutations, len(tested.smallest) - 1)
        for signal in family:
            names = [EMBEDDINGS, CLASSIFIER] if signal.kind == "vectors" else [signal.name]
            effect = signal.effect()
            for name in names:
                corrected = budget.corrected(tested.adjusted[name], len(families), with_streams=bool(stream_values))
                drifts = corrected <= budget.alpha and effect.largest >= settings.least_effect
                counts = int(signal.is_live.sum()), int((~signal.is_live).sum())
                findings.append(
                    Finding(name, signal.against, *counts, tested.p[name], corrected, effect, drifts, signal.psi())
                )
        discrepancy = statistics.get(EMBEDDINGS)
        if isinstance(discrepancy, MeanDiscrepancy):
            alarm_at = tested.threshold(level)
            permuted = tested.statistics[EMBEDDINGS][1:]
            power = estimate_power(discrepancy, permuted, family[0].is_live, alarm_at, settings.share, settings.seed)
    streams = _changes(sides, stream_values, budget)
    check = Check(NONE, "", budget, permutations, findings, table.unmeasured, streams, power)
    check.verdict, check.reason = _verdict(check, len(sides.live))
    if check.verdict == DRIFT:
        _locate(check, sides, settings)
    return check


def _test(family: Sequence[Signal], level: float, seed: int) -> tuple[JointTest, dict[str, Any]]:
    statistics = {name: statistic for signal in family for name, statistic in signal.statistics(seed).items()}
    permutations = permutations_for(level, len(statistics))
    return test_jointly(statistics, family[0].is_live, permutations, seed), statistics


def permutations_for(level: float, statistics: int) -> int:
    """Return how many permutations test a family of `statistics` statistics at `level`. The smallest p-value of each statistic may
    come from a different permutation, so the corrected one is at least statistics / (permutations + 1)."""
    coarse = np.clip(np.ceil(RESOLUTION / level), FEWEST_PERMUTATIONS, ENOUGH_PERMUTATIONS)
    return int(min(max(coarse, np.ceil(statistics / level)), MOST_PERMUTATIONS))


def _stream_values(sides: Sides, families: Sequence[Sequence[Signal]]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return, by signal, the live rows' values in time order and the reference rows' values; empty if there are no times."""
    order = reading.by_time(sides.live)
    if order is None:
        return {}
    mean = sides.vectors[: len(sides.reference)].mean(axis=0)
    distance = 1 - sides.vectors @ (mean / max(float(np.linalg.norm(mean)), 1e-12))
    streams = {"distance": (distance[len(sides.reference) :][order], distance[: len(sides.reference)])}
    for signal in (signal for family in families for signal in family):
        if signal.kind != "number" or signal.against != sides.against or signal.name == "turns":
            continue
        live = np.full(len(sides.live), np.nan)
        numbers = np.array(signal.rows)[signal.is_live] - signal.first_live
        live[numbers] = signal.values[signal.is_live]
        streams[signal.name] = (live[order], signal.values[~signal.is_live])
    return streams


def _changes(sides: Sides, streams: Mapping[str, tuple[np.ndarray, np.ndarray]], budget: Budget) -> list[Change]:
    order = reading.by_time(sides.live)
    if not streams or order is None:
        return []
    times = np.array([conversation.time for conversation in sides.live], dtype=np.float64)[order]
    delta = budget.for_stream(len(streams))
    changes = [find_change(name, live, times, reference, delta) for name, (live, reference) in streams.items()]
    return [change for change in changes if change is not None]


def _verdict(check: Check, live_rows: int) -> tuple[str, str]:
    """Return the verdict and its reason."""
    drifting = [finding for finding in check.findings if finding.drifts]
    if drifting or check.streams:
        names = list(
            dict.fromkeys([finding.name for finding in drifting] + [change.signal for change in check.streams])
        )
        return DRIFT, f"{', '.join(names)}: beyond the error budget"
    power = check.power
    if power is not None and not power.can_alarm:
        reason = f"no signal could raise an alarm: the error budget of a check is too small for {check.permutations:,} permutations"
        return UNDECIDED, f"{reason}; give fewer --checks or a larger --alpha"
    if power is None:
        reason = f"too few rows: {live_rows} live ones; give at least {reading.FEWEST} on each side, better 500"
        return UNDECIDED, reason
    detection = f"a move of {power.share:.0%} of them to one topic would be detected in {power.power:.0%} of cases"
    if power.power < WANTED:
        needed = (
            f"{power.live_rows_needed:,} live rows"
            if power.live_rows_needed is not None
            else f"{power.rows_needed:,} rows on each side"
        )
        return UNDECIDED, f"too few rows: {power.live_rows:,}; {detection}; {WANTED:.0%} needs {needed}"
    return NONE, f"no signal of {power.live_rows:,} rows exceeds the error budget; {detection}"


def _locate(check: Check, sides: Sides, settings: Settings) -> None:
    """Find which rows drift, and since when."""
    is_live = sides.is_live
    if min(int(is_live.sum()), int((~is_live).sum())) < reading.FEWEST:
        return
    check.clusters = grown_clusters(sides.vectors, is_live, sides.live, settings.seed)
    order = reading.by_time(sides.live)
    if order is None:
        return
    times = [sides.live[number].time for number in order]
    begin = moment_of_change(sides.vectors, is_live, order)
    moments = [change.time for change in check.streams if change.time is not None]
    check.since = times[begin] if begin is not None else min(moments) if moments else times[0]
