"""Decide from the gates whether a candidate is refused, held without traffic for a person, given its share, or promoted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dstune.cycle.gates import KEY, NEW_ROWS
from dstune.cycle.settings import CycleSettings
from dstune.grading.verdicts import PASSED, UNDECIDED, WORSE, verdict_of

REFUSED, HELD, CHALLENGES, PROMOTED = "refused", "held", "challenges", "promoted"

A_PERSON = "more rows and `judge`, or a person by `challenge`, `promote` or `rollback`, decide"

GateLine = Mapping[str, Any]
"""A gate as `judge.json` and the ledger have it."""


def summarize(gates: Sequence[GateLine]) -> tuple[str, str]:
    """Return the common result of the gates (failed, undecided or passed), and the reason."""
    if failures := _failures(gates):
        return "failed", failures
    undecided = [gate for gate in gates if verdict_of(gate) == UNDECIDED]
    passed = f"{len(gates) - len(undecided)} of {len(gates)} gates passed"
    if not undecided:
        return "passed", passed
    sets = [gate for gate in gates if gate["is_set"]]
    is_shown = any(verdict_of(gate) == PASSED for gate in sets)
    is_held = any(
        gate.get("holds", False) or (gate["is_set"] and (_has_enough_rows(gate) or _is_lossy(gate)))
        for gate in undecided
    )
    state = "passed" if is_shown and not is_held else "undecided"
    return state, f"{passed}, undecided: {_needs(undecided)}"


def _has_enough_rows(gate: GateLine) -> bool:
    """Return whether an undecided gate has enough rows that it would usually decide an equally good candidate."""
    return gate["rows_needed"] is not None and bool(gate["rows"] >= gate["rows_needed"])


def _is_lossy(gate: GateLine) -> bool:
    """Return whether an undecided gate shows that the candidate loses something, even if that is within the margin."""
    return bool(gate["high"] < 0)


def decide_candidate(
    settings: CycleSettings, gates: Sequence[GateLine], largest_key: float, replaces: str | None = None
) -> tuple[str, str]:
    """Return the decision about a candidate, and the reason.

    largest_key: the largest share of its new rows from a single key. replaces: the current version if it holds deleted rows. Then
    a candidate is not held unless it is shown to lose something, and `auto_promote` asks for no gain.
    """
    state, reason = summarize(gates)
    if state == "failed":
        return REFUSED, reason
    if all(gate["name"].startswith(KEY) for gate in gates):
        return REFUSED, "no gate had enough rows to judge"
    pending = f"{replaces} holds deleted rows; " if replaces else ""
    if state == "undecided" and (not replaces or any(_shows_a_loss(gate) for gate in gates)):
        return HELD, f"{pending}{reason}; {A_PERSON}"
    if state == "undecided":
        return CHALLENGES, f"{pending}{settings.share:.0%} of the traffic, though {reason}; a person promotes it"
    if settings.auto_promote is not None and (question := _reason_to_ask(settings, gates, largest_key, replaces)):
        return CHALLENGES, f"{pending}{question}: a person decides"
    if settings.auto_promote is not None:
        return PROMOTED, f"{pending}within the bounds of auto_promote: {_gain(_new_rows(gates)) or reason}"
    return CHALLENGES, f"{pending}{settings.share:.0%} of the traffic; a person promotes it"


def _shows_a_loss(gate: GateLine) -> bool:
    """Return whether an undecided set, or an undecided gate that has to pass, shows that the candidate loses something."""
    has_to_pass = gate["is_set"] or gate.get("holds", False)
    return verdict_of(gate) == UNDECIDED and has_to_pass and (_is_lossy(gate) or bool(gate.get("loses", False)))


def _reason_to_ask(settings: CycleSettings, gates: Sequence[GateLine], largest_key: float, replaces: str | None) -> str:
    """Return why a person must decide although `auto_promote` is set; empty if all its bounds hold."""
    bounds, new = settings.auto_promote, _new_rows(gates)
    assert bounds is not None
    if largest_key > settings.share_per_key:
        return f"one key gave {largest_key:.0%} of the rows, more than {settings.share_per_key:.0%}"
    if replaces:
        return _lossy_gates(gates)
    if new is None:
        return "no new rows were held out to measure a gain on"
    if not (new["rows"] >= bounds.least_new_rows and new["low"] > bounds.least_gain):
        return f"outside the bounds of auto_promote ({_gain(new)})"
    return _lossy_gates(gates)


def _lossy_gates(gates: Sequence[GateLine]) -> str:
    """Return the undecided gates that show a loss, as text; empty if there are none."""
    lossy = [gate for gate in gates if verdict_of(gate) == UNDECIDED and _is_lossy(gate)]
    return f"loses, and perhaps more than is allowed: {_needs(lossy)}" if lossy else ""


def _new_rows(gates: Sequence[GateLine]) -> GateLine | None:
    return next((gate for gate in gates if gate["name"] == NEW_ROWS), None)


def _gain(new: GateLine | None) -> str:
    return "" if new is None else f"gain on {new['rows']} new rows from {new['low']:+.4f}"


def _failures(gates: Sequence[GateLine]) -> str:
    """Return the gates in which the candidate is worse, as text; empty if there are none."""
    failed = [gate for gate in gates if verdict_of(gate) == WORSE]
    keys = [gate for gate in failed if gate["name"].startswith(KEY)]
    worse = [gate["name"] for gate in failed if gate not in keys]
    parts = [f"{gate['name']} contradicts the others ({gate['reason']}): exclude_keys leaves it out" for gate in keys]
    return "; ".join([*([f"worse than the current version on {', '.join(worse)}"] if worse else []), *parts])


def _needs(undecided: Sequence[GateLine]) -> str:
    return ", ".join(
        f"{gate['name']} ({gate['rows']} rows, {_missing(gate)})"
        for gate in sorted(undecided, key=lambda gate: not gate["is_set"])
    )


def _missing(gate: GateLine) -> str:
    needed = gate["rows_needed"]
    if needed is None:
        return "allows no loss, which no number of rows shows"
    return f"{needed} needed" if needed > gate["rows"] else "enough for a candidate that is as good"
