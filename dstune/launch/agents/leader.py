"""The leader of a run on several nodes: the agent that holds the run's lease. It hears from the agents of all nodes, and starts,
ends and restarts their ranks together."""

from __future__ import annotations

import socket
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from dstune.core.errors import EXIT_DONE, EXIT_FAILED, EXIT_PREEMPTED, UserError
from dstune.core.lease import Lease, LeaseRecord
from dstune.core.paths import STOP_FILE, STOP_REASON
from dstune.launch import attempt as attempts
from dstune.launch import records
from dstune.launch.agents.group import JOIN_SECONDS, Attempt, Group, Member, Orders
from dstune.launch.agents.status import GROUP_FILE, GroupStatus
from dstune.launch.agents.task import REQUEUED_REJOIN_SECONDS, Settings
from dstune.launch.agents.wire import LEADER, Link, Message
from dstune.launch.console import Console
from dstune.launch.local.restarts import Restarts
from dstune.launch.verdict import Ended, Verdict, judge

BEAT_SECONDS = 1.0
"""Between two signs of life, of agents, of the leader and of the lease."""
PAUSE_SECONDS = 3.0
"""A longer gap between two ticks means that this process was stopped: the silence of others is not theirs then."""
PROOF_SECONDS = 10.0
"""How long a stranger may stay connected."""
MOST_STRANGERS = 256
"""Connections of peers that have not introduced themselves; a further one takes the place of the oldest."""
YIELD_SECONDS = 5.0
"""A leader that has been without enough nodes for so long lets another one lead, once."""
SAME_REQUEST_SECONDS = 5.0
"""A queue sends the same signal to all nodes of a job."""
SILENT = "it was silent"
MESSAGES = "launch.log"
"""In `logs/`: what the leader says; the command that started the run shows it."""


class MessageConsole(Console):
    """A console that only says what the leader says."""

    def __init__(self, say: Callable[[str], None]):
        super().__init__()
        self._say = say

    def message(self, text: str) -> None:
        self._say(text)


@dataclass
class Peer:
    """A connection to an agent."""

    link: Link
    heard: float
    node: str = ""
    """Empty until its agent has introduced itself."""


class LeaseKeeper(threading.Thread):
    """Shows that the holder of the lease is alive. A thread, since a file system of a network may not answer for minutes."""

    def __init__(self, lease: Lease, generation: int, record: LeaseRecord):
        super().__init__(name="lease", daemon=True)
        self.lease, self.generation, self.record = lease, generation, record
        self.renewed = time.monotonic()
        """When the last renewal that succeeded began."""
        self.is_superseded = False
        self.ended = threading.Event()
        self._lock = threading.Lock()

    def run(self) -> None:
        while not self.ended.wait(BEAT_SECONDS):
            with suppress(OSError):
                self.renew()

    def renew(self) -> None:
        """Show a sign of life, and look for a newer generation. Raises OSError."""
        with self._lock:
            began = time.monotonic()
            if self.lease.newest() > self.generation:
                self.is_superseded = True
                self.ended.set()
                return
            self.record = replace(self.record, beat=self.record.beat + 1)
            self.lease.renew(self.generation, self.record)
            self.renewed = began

    def advance(self, mark: str) -> bool:
        """Begin the next generation, for ranks with `mark`. Returns whether the lease is still held. Raises OSError."""
        with self._lock:
            began = time.monotonic()
            record = replace(self.record, mark=mark, beat=0, attempts=self.record.attempts + 1)
            generation = self.lease.take(self.generation, record)
            if generation is None:
                self.is_superseded = True
                return False
            self.generation, self.record, self.renewed = generation, record, began
            return True

    def release(self, *, is_over: bool = False) -> None:
        """Give the lease back: no rank of its generation is left. is_over: nor does any agent of this launch go on."""
        self.ended.set()
        with self._lock, suppress(OSError):
            if not self.is_superseded and self.lease.newest() == self.generation:
                self.lease.write(self.generation, replace(self.record, is_released=True, is_over=is_over))


class Leader(Orders):
    """Leads the agents of a run until it is over, or until another agent holds the lease.

    keeper: of the lease that this process has just taken. server: where agents connect. now: since when nodes are waited for.
    lost_leader: the node that led this launch before and is gone, if there is one. may_yield: whether it gives the lease back
    when too few nodes reach it.
    """

    def __init__(
        self,
        run_dir: Path,
        settings: Settings,
        secret: str,
        keeper: LeaseKeeper,
        server: socket.socket,
        now: float,
        node: str,
        message: Callable[[str], None],
        lost_leader: str = "",
        *,
        may_yield: bool = True,
    ):
        self.run_dir, self.settings, self.node = run_dir, settings, node
        self.keeper, self.is_deposed, self.has_yielded = keeper, False, False
        self._may_yield = may_yield
        self.outcome: Verdict | None = None
        """How the run ended; None while it goes on."""
        self._secret, self._server, self._message = secret, server, message
        rejoin = REQUEUED_REJOIN_SECONDS if settings.requeues else JOIN_SECONDS
        self.group = Group(
            settings.nodes,
            settings.min_nodes,
            self,
            now,
            message=message,
            rejoin_seconds=rejoin,
            expected=settings.expected,
        )
        self._received: list[str] = []
        attempts = keeper.record.attempts
        self._restarts = Restarts(
            max(0, settings.restarts - attempts), run_dir, MessageConsole(message), self._received
        )
        self._lost_leader = lost_leader
        if lost_leader:
            message(f"dstune: {lost_leader}, which led the run, was lost; {node} leads now")
        if lost_leader or not may_yield:
            self.group.expect_soon()
        self.peers: list[Peer] = []
        self._log_starts: dict[int, int] = {}
        self._signals: dict[str, dict[str, float]] = {}
        """When each node has reported a signal, by its name."""
        self._ticked = self._last_beat = now
        self._size = 1
        self._written: GroupStatus | None = None
        self._first_step = self._step()
        server.setblocking(False)

    # -- events -------------------------------------------------------------------------------------------------------

    def tick(self, now: float) -> None:
        """Hear the agents and go on."""
        if self.outcome is not None or self.is_deposed:
            return
        gap, self._ticked = now - self._ticked, now
        if gap > PAUSE_SECONDS:
            with suppress(OSError):
                self.keeper.renew()  # first of all: another agent may lead by now
            for peer in self.peers:
                peer.heard += gap
        if self.keeper.is_superseded:
            self._depose("another agent leads this run now")
            return
        if now - self.keeper.renewed > max(self.settings.silence_seconds * 0.6, gap + BEAT_SECONDS):
            self._depose("the lease of the run cannot be renewed: its file system does not answer")
            return
        self._accept(now)
        for peer in list(self.peers):
            self._receive(peer, now)
        if now - self._last_beat >= BEAT_SECONDS:
            self._last_beat = now
            for peer in self.peers:
                peer.link.send({"alive": True})
        self._obey_stop_file()
        if self._lost_leader and self.keeper.record.attempts > self.settings.restarts:
            self._finish(Verdict(EXIT_FAILED, f"{self._lost_leader}, which led the run, was lost"))
            return
        if self._may_yield and self.group.lacks_nodes(now, YIELD_SECONDS):
            self._yield()
            return
        self.group.tick(now)
        self._write_status()

    @property
    def waiting_since(self) -> float:
        """Since when nodes are waited for."""
        return self.group.waiting_since

    def sockets(self) -> list[Any]:
        """Return what to wait on for events."""
        return [self._server, *(peer.link for peer in self.peers if not peer.link.closed)]

    def close(self) -> None:
        """Leave all agents. They end their ranks, and look for another leader, unless the run is over."""
        for peer in self.peers:
            peer.link.close("the leader has left")
        self.peers = []
        with suppress(OSError):
            self._server.close()
        self.keeper.ended.set()

    def _accept(self, now: float) -> None:
        while True:
            try:
                sock, _ = self._server.accept()
            except OSError:
                return
            strangers = [peer for peer in self.peers if not peer.node]
            if len(strangers) >= MOST_STRANGERS:
                strangers[0].link.close("too many others have connected since")
                self.peers.remove(strangers[0])
            self.peers.append(Peer(Link(sock, self._secret, LEADER), now))

    def _receive(self, peer: Peer, now: float) -> None:
        for message in peer.link.receive():
            peer.heard = now
            self._follow(peer, message, now)
        silent = now - peer.heard
        if silent > (self.settings.silence_seconds if peer.node else PROOF_SECONDS):
            peer.link.close(f"{SILENT} for {silent:.0f} s")
        if peer.link.closed:
            self.peers.remove(peer)
            if peer.node and all(other.node != peer.node for other in self.peers):
                self.group.lose(peer.node, peer.link.closed)

    def _follow(self, peer: Peer, message: Message, now: float) -> None:
        """Act on what an agent says. All agents know the secret; what they say is well-formed."""
        if "hello" in message:
            peer.node = message["hello"]
            for other in list(self.peers):  # an earlier connection of the same node
                if other is not peer and other.node == peer.node:
                    other.link.close("its agent was started again")
                    self.peers.remove(other)
            self.group.join(Member(peer.node, message["order"], message["ranks"]))
        elif message.get("generation") == self.keeper.generation:
            if "ended" in message:
                ended = [Ended(rank, code, 0, signalled) for rank, code, signalled in message["ended"]]
                self.group.report(peer.node, ended, message["stopped"])
            elif "failed" in message:
                self.group.fail(peer.node)
        elif "signal" in message:
            self._note_signal(message["signal"], peer.node, now)

    def _note_signal(self, name: str, node: str, now: float) -> None:
        """Note a signal. A queue that asks a job to stop signals all its nodes; on a single one, it only takes this node away."""
        earlier = self._signals.get(name, {})
        fresh = {other: when for other, when in earlier.items() if now - when < SAME_REQUEST_SECONDS}
        self._signals[name] = {node: now} | fresh
        # Once for all nodes, however many report it.
        if node not in fresh and len(fresh) + 1 == min(2, len(self.group.members)):
            self._received.append(name)
            self.group.stop(name)

    def _obey_stop_file(self) -> None:
        """Obey the stop file: while no rank runs, nobody else looks for it."""
        if self.group.attempt is None and not self.group.is_over and (self.run_dir / STOP_FILE).exists():
            (self.run_dir / STOP_FILE).unlink(missing_ok=True)
            self._received.append(STOP_REASON)
            self.group.stop(STOP_REASON)

    def _depose(self, reason: str) -> None:
        self.is_deposed = True
        self.close()  # first of all: where the file system does not answer, the next line waits for it
        self._message(f"dstune: {self.node} does not lead any more: {reason}")

    def _yield(self) -> None:
        """Let another node lead: a partition may have left this one alone, while its file system is still there."""
        self.has_yielded = True
        self.keeper.release()
        self._depose("too few nodes can reach it")

    # -- orders -------------------------------------------------------------------------------------------------------

    def start(self, attempt: Attempt) -> None:
        mark = uuid.uuid4().hex
        try:
            if not self.keeper.advance(mark):
                self._depose("another agent leads this run now")
                return
            records.forget_ends(self.run_dir)
        except OSError as error:
            self._depose(f"the run directory cannot be written: {error}")
            return
        self._size = attempt.size
        ranks = range(attempt.size)
        self._log_starts = {rank: attempts.size(attempts.log_path(self.run_dir, rank)) for rank in ranks}
        places = ", ".join(f"{share.node} ({share.ranks})" for share in attempt.shares)
        self._message(f"dstune: starting {attempt.size} rank{'s' * (attempt.size > 1)} on {places}")
        for share in attempt.shares:
            order = {"first": share.first_rank, "size": attempt.size, "mark": mark}
            self._send(share.node, {"start": self.keeper.generation, **order})

    def end(self, node: str) -> None:
        self._send(node, {"end": self.keeper.generation})

    def stop(self, node: str, signal_name: str) -> None:
        self._send(node, {"stop": signal_name})

    def after(self, attempt: Attempt, stop_signal: str | None, *, forced: bool) -> float | None:
        verdict = self._judge(attempt, stop_signal, forced)
        decision = self._restarts.decide(verdict, self, is_external=bool(attempt.lost))
        if decision.wait is None:
            ended = decision.verdict
            if ended.exit_code == EXIT_FAILED and attempt.lost and self._goes_back_to_queue(attempt):
                ended = Verdict(EXIT_PREEMPTED, f"{verdict.reason}: the job goes back to the queue")
            self._finish(ended, attempt)
            return None
        return decision.wait

    def give_up(self, reason: str, *, stopped: bool) -> None:
        if stopped or self._goes_back_to_queue(None):
            self._finish(Verdict(EXIT_PREEMPTED, reason))
        else:
            self._finish(Verdict(EXIT_FAILED, reason))

    def _goes_back_to_queue(self, attempt: Attempt | None) -> bool:
        """Return whether a job that lost nodes asks the queue for others: a node is dead, or the job has trained at all. One
        whose agents end as soon as they start would come again for ever."""
        is_dead = attempt is not None and any(SILENT in cause for cause in attempt.lost.values())
        return self.settings.requeues and (is_dead or self._step() > self._first_step)

    def _step(self) -> int:
        return int(records.read_metrics(self.run_dir).last.get("step", 0))

    def last_lines(self, rank: int, count: int = attempts.TAIL_LINES) -> list[str]:
        """Return the end of what `rank` wrote during this attempt."""
        return attempts.last_lines(attempts.log_path(self.run_dir, rank), self._log_starts.get(rank, 0), count)

    def _judge(self, attempt: Attempt, stop_signal: str | None, forced: bool) -> Verdict:
        errors = attempts.read_errors(self.run_dir, attempt.size)
        result = records.read_result(self.run_dir)
        if attempt.lost and not forced:
            mistake = next((error for error in errors.values() if isinstance(error, UserError)), None)
            if mistake is not None:
                return Verdict(mistake.exit_code, str(mistake), None, mistake)
            if result is None or result.get("status") not in ("completed", "stopped", "pruned"):
                lost = "; ".join(f"{node} was lost ({cause})" for node, cause in sorted(attempt.lost.items()))
                return Verdict(EXIT_FAILED, lost)
        verdict = judge(attempt.ended, errors, stop_signal, forced, attempt.stopped)
        if verdict.exit_code == EXIT_DONE and result is None:
            return Verdict(EXIT_FAILED, "the ranks ended without a result")
        if verdict.culprit is not None and not isinstance(verdict.error, UserError):
            rank = verdict.culprit.rank
            place = f"rank {rank} on {attempt.node_of(rank)}"
            reason = verdict.reason.removeprefix(f"rank {rank} ")
            joined = f"{place}: {reason}" if reason == verdict.reason else f"{place} {reason}"
            return replace(verdict, reason=joined)
        return verdict

    def _finish(self, verdict: Verdict, attempt: Attempt | None = None) -> None:
        failure = None
        if verdict.exit_code == EXIT_FAILED:
            culprit = verdict.culprit
            node = attempt.node_of(culprit.rank) if attempt and culprit else None
            lost = sorted(attempt.lost) if attempt else []
            failure = {
                "rank": culprit and culprit.rank,
                "node": node or next(iter(lost), None),
                "cause": verdict.reason,
            }
        with suppress(OSError):
            if failure is not None:  # a rank that was told to end may have said that it was asked to stop
                records.result_path(self.run_dir).unlink(missing_ok=True)
            attempts.record(self.run_dir, verdict, self._size, failure)
        if verdict.reason:
            self._message(f"dstune: {verdict.reason}")
        for peer in self.peers:
            peer.link.send({"over": verdict.exit_code})
        self.outcome = verdict
        self._write_status()
        self.keeper.release(is_over=True)

    def _send(self, node: str, message: Message) -> None:
        for peer in self.peers:
            if peer.node == node:
                peer.link.send(message)

    def _write_status(self) -> None:
        attempt = self.group.attempt
        training = {share.node for share in attempt.shares} - {*attempt.lost} if attempt else set()
        status = GroupStatus(
            generation=self.keeper.generation,
            leader=self.node,
            training=sorted(training),
            spare=sorted(self.group.members.keys() - training),
            lost=sorted(attempt.lost) if attempt else [],
            restarts=max(0, self.keeper.record.attempts - 1),
            is_over=self.outcome is not None,
        )
        if status != self._written:
            with suppress(OSError):
                records.write_json(self.run_dir / GROUP_FILE, asdict(status))
                self._written = status
