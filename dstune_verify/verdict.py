"""What the outcomes mean, in words and as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dstune_verify import VERSION, certificate, environment, known_faults
from dstune_verify.cases import CRASHED, NOT_RUN, RIGHT, WRONG, Case, Outcome
from dstune_verify.world import device_type

CPU_LIMITS = "A CPU cannot show faults of streams, of NCCL and of GPU kernels: run it on the devices that you train on."
MARKS = {RIGHT: "right  ", WRONG: "WRONG  ", CRASHED: "FAILED ", NOT_RUN: "not run"}


@dataclass(frozen=True)
class Verdict:
    """The outcomes of all cases on this stack."""

    outcomes: Sequence[Outcome]
    cases: Mapping[str, Case]
    ranks: int

    def as_json(self) -> dict[str, Any]:
        """Return the verdict as JSON can hold it. Nothing in it identifies a user, a machine or a path."""
        return {
            "format": VERSION,
            "ranks": self.ranks,
            "stack": environment.facts(),
            "counts": {status: self._count(status) for status in MARKS},
            "cases": [self._as_json(outcome) for outcome in self.outcomes],
        }

    def _as_json(self, outcome: Outcome) -> dict[str, Any]:
        fault = self._known(outcome)
        detail = certificate.without_private(outcome.detail)
        return asdict(outcome) | {"detail": detail, "known": asdict(fault) if fault else None}

    def as_text(self, *, whole: bool = False) -> str:
        """Return the verdict for a terminal. whole: with the cases that are right, which progress has shown otherwise."""
        stack = environment.facts()
        names = ", ".join(f"{name} {version}" for name, version in stack["packages"].items())
        lines = ["", f"{names}; Python {stack['python']}", f"{self.ranks} ranks on {stack['device']['name']}", ""]
        for status in (*([RIGHT] if whole else []), WRONG, CRASHED, NOT_RUN):
            for outcome in self.outcomes:
                if outcome.status == status:
                    lines += [line_of(outcome), *(f"        {line}" for line in self._explained(outcome))]
        counts = ", ".join(f"{self._count(status)} {status}" for status in MARKS if self._count(status))
        lines += ["", f"{len(self.outcomes)} cases: {counts}"]
        if device_type() == "cpu":
            lines.append(CPU_LIMITS)
        return "\n".join(lines)

    def _explained(self, outcome: Outcome) -> list[str]:
        if outcome.status in (RIGHT, NOT_RUN):
            return []
        fault = self._known(outcome)
        if fault is None:
            return [
                "No known fault fits: --scripts FOLDER writes a script that shows it, for an issue upstream."
                if outcome.status == WRONG
                else "No known fault fits; it says nothing about gradients."
            ]
        return [f"Known: {fault.what} ({fault.source}; {fault.versions}).", f"What helps: {fault.remedy}."]

    def _known(self, outcome: Outcome) -> known_faults.KnownFault | None:
        if outcome.status not in (WRONG, CRASHED):
            return None
        return known_faults.find(self.cases[outcome.case], outcome.status)

    def _count(self, status: str) -> int:
        return sum(outcome.status == status for outcome in self.outcomes)


def visible(text: str) -> str:
    """Return `text` without characters that a terminal would obey: it may quote a stranger's file."""
    return "".join(
        character if character.isprintable() or character in "\n\t" else character.encode("unicode_escape").decode()
        for character in text
    )


def line_of(outcome: Outcome) -> str:
    """Return one line about an outcome: the status, the case, what is wrong or the error beside its bound."""
    detail = outcome.detail
    if outcome.status == RIGHT and outcome.errors:
        name = "gradient" if "gradient" in outcome.errors else next(iter(outcome.errors))
        detail = f"{name} {outcome.errors[name]:.2g}, bound {outcome.bounds[name]:g}"
    return visible(f"{MARKS[outcome.status]} {outcome.case:<38} {detail}".rstrip())
