"""What ranks that other programs started have left in the run directory: logs, errors, a result."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dstune.core.errors import EXIT_DONE, EXIT_FAILED, EXIT_PREEMPTED, DstuneError, UserError, from_json
from dstune.launch import records
from dstune.launch.console import Console
from dstune.launch.verdict import Ended, Verdict

TAIL_LINES = 20


def log_path(run_dir: Path, rank: int) -> Path:
    return run_dir / "logs" / f"rank-{rank}.log"


def read_errors(run_dir: Path, size: int) -> dict[int, DstuneError]:
    """Return what ranks said about their end, by rank."""
    errors: dict[int, DstuneError] = {}
    for rank in range(size):
        try:
            errors[rank] = from_json((run_dir / "logs" / f"rank-{rank}.error").read_text())
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return errors


def size(log: Path) -> int:
    """Return bytes of a log; 0 where there is none yet."""
    return log.stat().st_size if log.exists() else 0


def last_lines(log: Path, start: int = 0, count: int = TAIL_LINES) -> list[str]:
    """Return the end of `log` behind its byte `start`."""
    try:
        with log.open("rb") as stream:
            stream.seek(max(start, stream.seek(0, os.SEEK_END) - 65536))
            text = stream.read().decode(errors="replace")
    except OSError:
        return []
    return [line.rsplit("\r", 1)[-1] for line in text.rstrip().split("\n")][-count:] if text.strip() else []


def of_files(run_dir: Path, size: int, otherwise: str) -> Verdict:
    """Return why ranks ended that nobody here waited for. otherwise: the reason where they did not say any."""
    errors = read_errors(run_dir, size)
    for rank, error in sorted(errors.items()):
        if isinstance(error, UserError):
            return Verdict(error.exit_code, str(error), Ended(rank, error.exit_code, 0), error)
    result = records.read_result(run_dir)
    if result is None:
        blamed = next(iter(sorted(errors)), None)
        if blamed is not None:
            return Verdict(EXIT_FAILED, str(errors[blamed]), Ended(blamed, EXIT_FAILED, 0), errors[blamed])
        return Verdict(EXIT_FAILED, otherwise)
    reason = str(result.get("reason") or "")
    status = result.get("status")
    if status in ("completed", "stopped", "pruned"):
        return Verdict(EXIT_DONE, "")
    if status == "preempted":
        return Verdict(EXIT_PREEMPTED, f"{reason}: saved at step {result.get('steps')}")
    failure = result.get("failure")
    failed_rank = failure.get("rank") if isinstance(failure, dict) else None
    if type(failed_rank) is not int or not 0 <= failed_rank < size:
        return Verdict(EXIT_FAILED, reason)
    return Verdict(EXIT_FAILED, reason, Ended(failed_rank, EXIT_FAILED, 0), errors.get(failed_rank))


def record(run_dir: Path, verdict: Verdict, size: int, failure: dict[str, Any] | None = None) -> None:
    """Write `result.json` where the ranks did not get to it. failure: see `records.write_result`."""
    if not records.result_path(run_dir).exists():
        status = "preempted" if verdict.exit_code == EXIT_PREEMPTED else "failed"
        records.write_result(run_dir, status, verdict.reason, size, failure)


def explain(run_dir: Path, verdict: Verdict, console: Console, starts: Mapping[int, int]) -> None:
    """Say on stderr why the run did not complete; a user's mistake is raised instead.

    starts: where this launch began in the log of each rank, in bytes.
    """
    if verdict.exit_code == EXIT_DONE:
        return
    if isinstance(verdict.error, UserError):
        raise verdict.error
    console.message(f"dstune: {verdict.reason}")
    if stall := stalled(run_dir, len(starts), starts) if verdict.exit_code == EXIT_FAILED else "":
        console.message(f"dstune: {stall}")
    if verdict.culprit is not None and verdict.error is None:
        log = log_path(run_dir, verdict.culprit.rank)
        console.message(f"last lines of {log}:")
        for line in last_lines(log, starts.get(verdict.culprit.rank, 0)) or ["(it wrote nothing)"]:
            console.message(f"  | {line}")


STALLED = re.compile(
    r"^dstune: rank \d+ made no progress for .*? in (.*?): (?:it waits in the collective (\w+)|it is in (.*?));"
)


def stalled(run_dir: Path, size: int, starts: Mapping[int, int]) -> str:
    """Say who waited for whom, from the last words of ranks that made no progress; empty where none of them says so.

    starts: where this launch began in the log of each rank, in bytes.
    """
    waiting: dict[str, list[int]] = {}
    elsewhere, silent = [], []
    for rank in range(size):
        lines = last_lines(log_path(run_dir, rank), starts.get(rank, 0), 400)
        first_match = next((match for line in lines if (match := STALLED.match(line))), None)
        if first_match is None:
            silent.append(rank)
        elif first_match[2]:
            waiting.setdefault(f"in the collective {first_match[2]} ({first_match[1]})", []).append(rank)
        else:
            elsewhere.append(f"rank {rank} was in {first_match[3]}")
    if not waiting:
        return ""
    parts = [f"rank{'s' * (len(ranks) > 1)} {_listed(ranks)} waited {place}" for place, ranks in waiting.items()]
    missing = f"rank{'s' * (len(silent) > 1)} {_listed(silent)} did not come to it and said nothing" if silent else ""
    return "; ".join(filter(None, [*parts, *elsewhere, missing]))


def _listed(ranks: Sequence[int]) -> str:
    first_ranks = ", ".join(map(str, ranks[:8]))
    return f"{first_ranks} and {len(ranks) - 8} more" if len(ranks) > 8 else first_ranks


class Follower:
    """Passes on what is appended to a log that another process, maybe on another machine, writes."""

    def __init__(self, log: Path, console: Console):
        self._log, self._console = log, console
        self._at = log.stat().st_size if log.exists() else 0
        self._rest = b""

    def look(self) -> None:
        """Show the lines that came since the last look."""
        try:
            with self._log.open("rb") as stream:
                stream.seek(self._at)
                data = stream.read()
        except OSError:
            return
        self._at += len(data)
        whole, newline, self._rest = (self._rest + data).rpartition(b"\n")
        lines = [line for line in whole.split(b"\n") if not line.startswith(b"=== rank ")] if newline else []
        if lines:
            self._console.forward(b"\n".join(lines) + b"\n")

    def end(self) -> None:
        self.look()
        if self._rest:
            self._console.forward(self._rest + b"\n")
            self._rest = b""
