"""Runs cases on all ranks, so that one that hangs or dies stops no other.

An *agent* is the process that the user or a launcher started. Started alone it owns all ranks of this machine; under torchrun,
deepspeed, srun or mpirun each agent owns one. It starts its ranks as further processes, reads their outcomes from files, and ends
them when one dies or takes too long. The agents agree through a key-value store, then start the ranks again with the remaining
cases.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

from dstune_verify import rank as rank_module
from dstune_verify.cases import CRASHED, NOT_RUN, RIGHT, WRONG, Case, Outcome
from dstune_verify.options import Options
from dstune_verify.world import Place, free_port, open_file_store, open_store, within

START_SECONDS = 180
"""For the imports of a rank: long, since many read packages from a network disk."""
POLL_SECONDS = 0.05
GONE = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process exited")
"""Words by which a collective says that another rank has ended."""
WITH_OTHERS = "stopped with the others"
OURS = (
    "TORCHELASTIC_USE_AGENT_STORE", "MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE",
    "GROUP_RANK", "ROLE_RANK",
)  # fmt: skip
"""Variables of the launcher that would let a rank join the launcher's rendezvous instead of ours."""


@dataclass
class RankReport:
    """What an agent knows about one of its ranks when a round ends."""

    rank: int
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    running: str = ""
    end: str = ""
    """How its process ended, if not in order: `signal 6`, `exit code 1`, `no end within 60 s`, `stopped with the others`."""
    last_lines: str = ""
    """The end of what it wrote to stderr."""


class Agents:
    """The processes that a launcher started, of which this is one. A single agent needs no store."""

    def __init__(self, place: Place | None, seconds: float, file: str | None = None):
        self.index, self.size = (place.rank, place.size) if place else (0, 1)
        self.store: Any = None
        self._seconds, self._messages = seconds, 0
        if place and place.size > 1 and file:
            self.store = within(open_file_store(file, place.size), "dstune-verify")
        elif place and place.size > 1:
            # torchrun keeps a store at this address itself.
            hosts = place.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
            restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            store = open_store(place.address, place.port, hosts, seconds)
            self.store = within(store, f"dstune-verify/{restart}")

    def gather(self, value: Any) -> list[Any]:
        """Return every agent's `value`, which JSON must be able to hold."""
        self._messages += 1
        if self.store is None:
            return [value]
        keys = [f"{self._messages}/{index}" for index in range(self.size)]
        self.store.set(keys[self.index], json.dumps(value))
        self.store.wait(keys, timedelta(seconds=self._seconds))
        return [json.loads(self.store.get(key)) for key in keys]

    def leave(self) -> None:
        """Let the first agent, whose process may serve the store, end last."""
        if self.store is None:
            return
        self.store.set(f"left/{self.index}", "")
        if self.index == 0:
            with contextlib.suppress(Exception):  # an agent that was killed does not come
                self.store.wait([f"left/{index}" for index in range(self.size)], timedelta(seconds=30))

    def stop_round(self, number: int) -> None:
        """Let all agents end their ranks of this round."""
        if self.store is not None:
            self.store.set(f"stop/{number}", "")

    def finish_round(self, number: int) -> None:
        """Say that the ranks of this agent ended in order."""
        if self.store is not None:
            self.store.set(f"finish/{number}/{self.index}", "")

    def stopped(self, number: int) -> bool:
        """Return whether an agent stopped this round."""
        return self.store is not None and bool(self.store.check([f"stop/{number}"]))

    def finished(self, number: int) -> bool:
        """Return whether the ranks of all agents ended in order."""
        return self.store is None or bool(self.store.check([f"finish/{number}/{index}" for index in range(self.size)]))


class Runner:
    """Runs cases on the ranks of all agents.

    ranks: number of ranks if this agent is the only one. seconds: limit of a case, if not the case's own.
    options: what ranks need to build the same cases.
    """

    def __init__(
        self,
        place: Place | None,
        ranks: int,
        *,
        seconds: float = 0,
        options: Options | None = None,
        store: str | None = None,
    ):
        self.agents = Agents(place, START_SECONDS, store)
        self.address = place.address if place else "127.0.0.1"
        self.size = place.size if place else ranks
        self.local = [(place.rank, place.local_rank)] if place else [(rank, rank) for rank in range(ranks)]
        self.seconds, self.options = seconds, options or Options()
        self._round = 0

    def run(self, cases: Sequence[Case]) -> Iterator[Outcome]:
        """Yield the outcome of each case, merged over all ranks. Every agent must consume it."""
        for group in dict.fromkeys(case.group for case in cases):
            remaining = [case for case in cases if case.group == group]
            while remaining:
                outcomes = self._run_round(remaining)
                yield from outcomes
                done = {outcome.case for outcome in outcomes}
                remaining = [case for case in remaining if case.name not in done]
        self.agents.leave()

    def _run_round(self, cases: Sequence[Case]) -> list[Outcome]:
        """Start all ranks with `cases`; return the outcomes up to the first case that stopped a rank. At least one."""
        self._round += 1
        port = self.agents.gather(free_port() if self.agents.index == 0 else 0)[0]
        with tempfile.TemporaryDirectory(prefix="dstune-verify-", ignore_cleanup_errors=True) as folder:
            ranks = [_Rank(self, rank, local, port, cases, Path(folder)) for rank, local in self.local]
            try:
                self._watch(ranks)
            finally:
                for rank in ranks:
                    rank.kill()
            reports = [asdict(rank.report()) for rank in ranks]
        everywhere = [read_report(report) for of_agent in self.agents.gather(reports) for report in of_agent]
        return merge(everywhere, [case.name for case in cases])

    def _watch(self, ranks: Sequence[_Rank]) -> None:
        """Return when all ranks of all agents have ended, or any of them must be stopped."""
        finished = False
        while not self.agents.stopped(self._round):
            for rank in ranks:
                rank.read()
            if any(rank.failed() for rank in ranks):
                self.agents.stop_round(self._round)
                time.sleep(1)  # others that die of the same cause get time to say so
                for rank in ranks:
                    rank.read()
                    rank.failed()
                return
            if not finished and all(rank.process.poll() == 0 for rank in ranks):
                finished = True
                self.agents.finish_round(self._round)
            if finished and self.agents.finished(self._round):
                return
            time.sleep(POLL_SECONDS)


class _Rank:
    """The process of one rank."""

    def __init__(self, runner: Runner, rank: int, local_rank: int, port: int, cases: Sequence[Case], folder: Path):
        self.outcomes_file = folder / f"outcomes-{rank}.jsonl"
        self.outcomes_file.touch()
        self.log = folder / f"log-{rank}.txt"
        self._reader = self.outcomes_file.open(encoding="utf-8")
        self._report, self._limits = RankReport(rank), {case.name: runner.seconds or case.seconds for case in cases}
        longest = max(self._limits.values())
        place = {"rank": rank, "size": runner.size, "local_rank": local_rank, "address": runner.address, "port": port}
        if runner.agents.size == 1:  # no other user can read or write in this folder, as everybody could at a port
            place["file"] = str(folder / "store")
        order = {
            "place": place,
            "cases": [case.name for case in cases],
            "options": asdict(runner.options),
            "outcomes": str(self.outcomes_file),
            "seconds": longest,
        }
        order_file = folder / f"order-{rank}.json"  # a variable holds 128 KiB, which a model's config.json may exceed
        order_file.write_text(json.dumps(order), encoding="utf-8")
        variables = {name: value for name, value in os.environ.items() if name not in OURS}
        variables |= {
            "RANK": str(rank), "WORLD_SIZE": str(runner.size), "LOCAL_RANK": str(local_rank),
            "MASTER_ADDR": runner.address, "MASTER_PORT": str(port), rank_module.ORDER: str(order_file),
        }  # fmt: skip
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                rank_command(), env=variables, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        self._since, self._limit = time.monotonic(), START_SECONDS + longest

    def read(self) -> None:
        """Take in what the rank has written."""
        for line in self._reader:
            message = json.loads(line)
            self._since = time.monotonic()
            if "running" in message:
                self._report.running = message["running"]
                self._limit = self._limits[message["running"]]
            else:
                outcome = Outcome(**message["outcome"])
                self._report.outcomes[outcome.case] = outcome
                self._report.running = ""
                self._limit = max(self._limits.values())  # until the other ranks come, or the process ends

    def failed(self) -> bool:
        """Return whether the process died or exceeded its limit."""
        code = self.process.poll()
        if code:
            self._report.end = f"signal {-code}" if code < 0 else f"exit code {code}"
        elif code is None and time.monotonic() - self._since > self._limit:
            self._report.end = f"no end within {self._limit:.0f} s"
        return bool(self._report.end)

    def kill(self) -> None:
        """End the process and those that it started."""
        if self.process.poll() is None:
            self._report.end = self._report.end or WITH_OTHERS
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def report(self) -> RankReport:
        """Return what is known at the end of the round."""
        self._reader.close()
        text = self.log.read_text(encoding="utf-8", errors="replace")
        self._report.last_lines = "\n".join(text.strip().splitlines()[-15:])[-2000:]
        return self._report


def rank_command() -> list[str]:
    """Return the command of a rank: the same interpreter with the same module path, which may have a zip file in it."""
    code = f"import sys; sys.path[:] = {sys.path!r}; from dstune_verify.rank import main; main()"
    return [sys.executable, "-c", code]


def read_report(values: dict[str, Any]) -> RankReport:
    """Read a report that another agent sent."""
    outcomes = {name: Outcome(**outcome) for name, outcome in values["outcomes"].items()}
    return RankReport(**{**values, "outcomes": outcomes})


def merge(reports: Sequence[RankReport], names: Sequence[str]) -> list[Outcome]:
    """Return the outcomes over all ranks, up to the first case that a rank did not end."""
    merged: list[Outcome] = []
    for name in names:
        outcomes = [report.outcomes[name] for report in reports if name in report.outcomes]
        if len(outcomes) == len(reports):
            merged.append(worst(outcomes))
            continue
        if not merged or any(name in (report.running, *report.outcomes) for report in reports):
            merged.append(_stopped(name, reports))
        break
    return merged


def worst(outcomes: Sequence[Outcome]) -> Outcome:
    """Return one rank's outcome, that of the worst status and largest error; the seconds are the longest."""
    order = (WRONG, CRASHED, NOT_RUN, RIGHT)

    def rank(outcome: Outcome) -> tuple[int, bool, float]:
        return order.index(outcome.status), says_another_ended(outcome), -max(outcome.errors.values(), default=0)

    ranked = sorted(outcomes, key=rank)
    return Outcome(**{**asdict(ranked[0]), "seconds": max(outcome.seconds for outcome in outcomes)})


def says_another_ended(outcome: Outcome) -> bool:
    """Return whether an exception only says that another rank has ended, whose own error says why."""
    return any(words in outcome.detail for words in GONE)


def _stopped(name: str, reports: Sequence[RankReport]) -> Outcome:
    """Return the outcome of a case in which a process ended or did not end in time."""
    ended = [report for report in reports if report.running == name and report.end not in ("", WITH_OTHERS)]
    raised = [outcome for report in reports for outcome in (report.outcomes.get(name),) if outcome]
    raised = [outcome for outcome in raised if outcome.status == CRASHED]
    if raised and not ended:  # where a process died, the exceptions of other ranks only say that it is gone
        return min(raised, key=says_another_ended)
    causes = ended or [report for report in reports if report.end not in ("", WITH_OTHERS)]
    cause = causes[0] if causes else reports[0]
    last = next((line for line in reversed(cause.last_lines.splitlines()) if line.strip()), "")
    return Outcome(name, CRASHED, f"rank {cause.rank}: {cause.end or 'ended'}; {last.strip()[:300]}".rstrip("; "))
