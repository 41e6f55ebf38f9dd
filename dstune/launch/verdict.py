"""Decides why a launch ended, and its exit code, as a pure function of how its ranks ended."""

from __future__ import annotations

import signal
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from dstune.core.errors import EXIT_DONE, EXIT_FAILED, EXIT_PREEMPTED, DstuneError, Stalled, UserError, WaitedInVain


@dataclass(frozen=True)
class Ended:
    """How one rank ended."""

    rank: int
    code: int
    """Exit code, or the negative number of the signal that killed it."""
    order: int
    """Position of the rank in the order in which the ends were noticed."""
    signalled_to_end: bool = False
    """Whether the launcher was ending it because another rank had died."""


@dataclass(frozen=True)
class Verdict:
    exit_code: int
    reason: str
    culprit: Ended | None = None
    """The rank that ended the run; None if none did."""
    error: DstuneError | None = None
    """The error that the culprit reported."""


def judge(
    ended: Sequence[Ended],
    errors: Mapping[int, DstuneError],
    stop_signal: str | None,
    forced: bool,
    stopped: Collection[int] = (),
    disconnected: Collection[int] = (),
) -> Verdict:
    """Return the verdict on the ends of all ranks.

    ended: every rank. errors: what ranks left in `logs/rank-N.error`. stop_signal: name of the signal that was
    forwarded to the ranks, if any. forced: a second signal ended them at once. stopped: ranks that the kernel did not let
    run (SIGSTOP) when the others stalled. disconnected: ranks whose log shows that they lost the connection to another rank.

    When one rank dies, the others soon fail in a collective with it, sometimes before its own end is noticed. The culprit is
    therefore, in this order: a rank that found a mistake of the user, one that a signal killed, one that left an error, the first
    that ended with a failure of its own, and the first that lost a connection. A rank that waited in vain is the culprit only if no
    other rank reports anything.
    """
    if forced:
        return Verdict(EXIT_FAILED, "stopped at once by a second signal")
    for end in sorted(ended, key=lambda end: end.rank):
        error = errors.get(end.rank)
        if isinstance(error, UserError):
            return Verdict(error.exit_code, str(error), end, error)
    for end in ended:
        if end.rank in stopped:
            waited = next(
                (str(error) for error in errors.values() if isinstance(error, WaitedInVain)), "the others waited"
            )
            reason = f"rank {end.rank} was stopped (SIGSTOP, or a debugger); {waited}"
            # Its log shows only that the others' connections were closed by the time that it was woken.
            return Verdict(EXIT_FAILED, reason, end, Stalled(reason))
    own_ends = sorted((end for end in ended if not end.signalled_to_end), key=lambda end: end.order)
    # The forwarded SIGTERM kills a rank that is still starting: nothing is lost by that, and the others must end too.
    if stop_signal and own_ends and own_ends[0].code == -signal.SIGTERM:
        return Verdict(EXIT_PREEMPTED, f"received {stop_signal} before training began")
    bad = [end for end in own_ends if end.code not in (EXIT_DONE, EXIT_PREEMPTED)]
    if bad:
        killed = [end for end in bad if end.code < 0]
        reported_ends = [end for end in ended if end.rank in errors and end.code not in (EXIT_DONE, EXIT_PREEMPTED)]
        reported_ends.sort(key=lambda end: isinstance(errors[end.rank], WaitedInVain))
        failed = [end for end in ended if end.code > 0 and end.code != EXIT_PREEMPTED and end.rank not in disconnected]
        failed.sort(key=lambda end: (end.signalled_to_end, end.order))
        culprit = next(iter(killed or reported_ends or failed or bad))
        # One that we ended while it left says what it had to say, whatever signal its end shows.
        if culprit.rank in errors and (culprit.code >= 0 or culprit.signalled_to_end):
            error = errors[culprit.rank]
            return Verdict(EXIT_FAILED, str(error), culprit, error)
        return Verdict(EXIT_FAILED, f"rank {culprit.rank} {exit_reason(culprit.code)}", culprit)
    preempted = [end for end in own_ends if end.code == EXIT_PREEMPTED]
    if preempted:
        reasons = [str(errors[end.rank]) for end in preempted if end.rank in errors]
        return Verdict(EXIT_PREEMPTED, reasons[0] if reasons else "saved")
    return Verdict(EXIT_DONE, "")


def exit_reason(code: int) -> str:
    """Return `code` in words: an exit code, or minus a signal's number."""
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    causes = {
        "SIGKILL": " (by hand, or by the kernel because memory ran out)",
        "SIGBUS": " (often a full /dev/shm or disk)",
        "SIGSEGV": " (a crash in native code)",
    }
    return f"was killed by {name}{causes.get(name, '')}"
