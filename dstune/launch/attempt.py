"""Reads what the ranks of an attempt left in the run directory (logs, errors, a result), and explains why a run ended."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from dstune.core.errors import EXIT_DONE, EXIT_FAILED, EXIT_PREEMPTED, DstuneError, UserError, from_json
from dstune.core.parsing import read_file
from dstune.launch import records
from dstune.launch.console import Console
from dstune.launch.verdict import Ended, Verdict

TAIL_LINES = 20
ERROR_FILE = re.compile(r"rank-(0|[1-9][0-9]{0,8})\.error")
GLOO_FAREWELL = " GLHF! \N{BEACH WITH UMBRELLA}\N{VARIATION SELECTOR-16}"
"""How gloo ends the message of a closed connection, which would read as the cause of a failure."""
DISCONNECTED = re.compile(
    r"gloo/.*(?:Connection (?:closed|reset) by peer|Broken pipe)|ncclRemoteError|Connection was likely closed"
)
"""What collectives (gloo, NCCL, torch's store) report on a rank whose peer has gone."""


def log_path(run_dir: Path, rank: int) -> Path:
    return run_dir / "logs" / f"rank-{rank}.log"


def read_errors(run_dir: Path, size: int, launch_folder: Path | None = None) -> dict[int, DstuneError]:
    """Return by rank the error with which it ended, for ranks that wrote one.

    launch_folder: where ranks wrote it if the disk of the run was full.
    """
    errors: dict[int, DstuneError] = {}
    for folder in filter(None, (launch_folder, run_dir / "logs")):
        for rank in _ranks_with_error(folder, size):
            with suppress(OSError, ValueError, KeyError, TypeError):
                errors[rank] = from_json(read_file(folder / f"rank-{rank}.error").decode())
    return dict(sorted(errors.items()))


def _ranks_with_error(folder: Path, size: int) -> list[int]:
    """Return the ranks below `size` that left a file of their error in `folder`.

    Lists the folder: every node of a run asks, and asking for the file of each rank would take nodes times ranks openings.
    """
    try:
        names = os.listdir(folder)
    except OSError:
        return []
    return [rank for match in map(ERROR_FILE.fullmatch, names) if match and (rank := int(match[1])) < size]


def size(log: Path) -> int:
    """Return the size of a log in bytes; 0 if it does not exist yet."""
    return log.stat().st_size if log.exists() else 0


def last_lines(log: Path, start: int = 0, count: int = TAIL_LINES) -> list[str]:
    """Return the last `count` lines of `log` after its byte `start`."""
    try:
        with log.open("rb") as stream:
            stream.seek(max(start, stream.seek(0, os.SEEK_END) - 65536))
            text = stream.read().decode(errors="replace")
    except OSError:
        return []
    lines = [line.rsplit("\r", 1)[-1] for line in text.rstrip().split("\n")][-count:] if text.strip() else []
    return [line.replace(GLOO_FAREWELL, "") for line in lines]


def disconnected(ended: Sequence[Ended], last_lines: Callable[[int], Sequence[str]]) -> set[int]:
    """Return the ranks that failed because another rank had gone. last_lines: returns those of a rank's log."""
    failed_ranks = [end.rank for end in ended if end.code == EXIT_FAILED]
    return {rank for rank in failed_ranks if any(map(DISCONNECTED.search, last_lines(rank)))}


def judge_files(run_dir: Path, size: int, default_reason: str) -> Verdict:
    """Return the verdict on ranks that were not child processes, from the files they left.

    default_reason: the reason of the failure if no rank wrote one.
    """
    errors = read_errors(run_dir, size)
    for rank, error in sorted(errors.items()):
        if isinstance(error, UserError):
            return Verdict(error.exit_code, str(error), Ended(rank, error.exit_code, 0), error)
    result = records.read_result(run_dir)
    if result is None:
        culprit = min(errors, default=None)
        if culprit is not None:
            return Verdict(EXIT_FAILED, str(errors[culprit]), Ended(culprit, EXIT_FAILED, 0), errors[culprit])
        return Verdict(EXIT_FAILED, default_reason)
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
    """Write `result.json` if the ranks have not. failure: see `records.write_result`."""
    if not records.result_path(run_dir).exists():
        status = "preempted" if verdict.exit_code == EXIT_PREEMPTED else "failed"
        records.write_result(run_dir, status, verdict.reason, size, failure)


def explain(run_dir: Path, verdict: Verdict, console: Console, starts: Mapping[int, int]) -> None:
    """Print on stderr why the run did not complete. Raises UserError if that is why.

    starts: by rank, the byte of its log at which this launch began.
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
    """Return which ranks waited in which collective, and which did not come to it; empty if no log says so.

    starts: by rank, the byte of its log at which this launch began.
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
    """Shows the lines that another process, perhaps on another machine, appends to a log."""

    def __init__(self, log: Path, console: Console):
        self._log, self._console = log, console
        self._offset = log.stat().st_size if log.exists() else 0
        self._partial_line = b""

    def look(self) -> None:
        """Show the lines that were appended since the last call."""
        try:
            with self._log.open("rb") as stream:
                stream.seek(self._offset)
                data = stream.read()
        except OSError:
            return
        self._offset += len(data)
        complete_lines, newline, self._partial_line = (self._partial_line + data).rpartition(b"\n")
        lines = [line for line in complete_lines.split(b"\n") if not line.startswith(b"=== rank ")] if newline else []
        if lines:
            self._console.forward(b"\n".join(lines) + b"\n")

    def end(self) -> None:
        """Show everything that is left; an unfinished last line counts as a line."""
        self.look()
        if self._partial_line:
            self._console.forward(self._partial_line + b"\n")
            self._partial_line = b""
