"""The leader of a run on several nodes: the agent that holds the run's lease. Agents of all nodes report to it, and it starts,
ends and restarts their ranks together."""

from __future__ import annotations

import selectors
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
"""Time between two heartbeats of an agent, of the leader and of the lease."""
PAUSE_SECONDS = 3.0
"""A longer gap between two ticks means that this process was suspended, so the other agents were not silent during it."""
PROOF_SECONDS = 10.0
"""How long a peer may stay connected without introducing itself."""
MOST_STRANGERS = 256
"""Most connections of peers that have not introduced themselves; a further one replaces the oldest."""
YIELD_SECONDS = 5.0
"""A leader that has lacked nodes for this long lets another agent lead, once."""
SAME_REQUEST_SECONDS = 5.0
"""Reports of a signal within this time are one request: a queue sends a signal to all nodes of a job."""
SILENT = "it was silent"
MESSAGES = "launch.log"
"""File in `logs/` with the messages of the leader, which the command that started the run shows."""


class MessageConsole(Console):
    """A console that passes messages to a function, and shows nothing else."""

    def __init__(self, show: Callable[[str], None]):
        super().__init__()
        self._show = show

    def message(self, text: str) -> None:
        self._show(text)


@dataclass
class Peer:
    """A connection to an agent."""

    link: Link
    last_heard: float
    node: str = ""
    """Empty until its agent has introduced itself."""
    descriptor: int = -1
    """Number of its socket, which the link forgets when it is closed."""


class LeaseKeeper(threading.Thread):
    """Renews the lease to show that its holder is alive.

    It is a thread because a network file system may not answer for minutes.
    """

    def __init__(self, lease: Lease, generation: int, record: LeaseRecord):
        super().__init__(name="lease", daemon=True)
        self.lease, self.generation, self.record = lease, generation, record
        self.renewed = time.monotonic()
        """When the last successful renewal began."""
        self.is_superseded = False
        self.ended = threading.Event()
        self._lock = threading.Lock()

    def run(self) -> None:
        while not self.ended.wait(BEAT_SECONDS):
            with suppress(OSError):
                self.renew()

    def renew(self) -> None:
        """Renew the lease, unless a newer generation of it exists. Raises OSError."""
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
        """Begin the next generation, for ranks with `mark`; return whether this agent still holds the lease. Raises OSError."""
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
        """Give the lease back, once no rank of its generation is left. is_over: whether all agents of this launch end too."""
        self.ended.set()
        with self._lock, suppress(OSError):
            if not self.is_superseded and self.lease.newest() == self.generation:
                self.lease.write(self.generation, replace(self.record, is_released=True, is_over=is_over))


class Leader(Orders):
    """Leads the agents of a run until it is over, or until another agent holds the lease.

    keeper: keeps the lease that this process has just taken. server: socket that agents connect to. now: when the wait for
    nodes began. lost_leader: the lost node that led this launch before; empty if there is none. may_yield: whether this leader
    gives the lease back when too few nodes reach it.
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
        self._peer_of_node: dict[str, Peer] = {}
        """The newest connection of each node whose agent has introduced itself."""
        self._selector = selectors.DefaultSelector()
        self._log_starts: dict[int, int] = {}
        self._signals: dict[str, dict[str, float]] = {}
        """When each node reported a signal, by name of the signal and node."""
        self._last_tick = self._last_beat = now
        self._size = 1
        self._written_status: GroupStatus | None = None
        self._first_step = self._last_step()
        server.setblocking(False)
        self._selector.register(server, selectors.EVENT_READ)

    # -- events -------------------------------------------------------------------------------------------------------

    def tick(self, now: float) -> None:
        """Handle the messages of the agents, and act on what has happened until `now`."""
        if self.outcome is not None or self.is_deposed:
            return
        gap, self._last_tick = now - self._last_tick, now
        if gap > PAUSE_SECONDS:
            with suppress(OSError):
                self.keeper.renew()  # before anything else: another agent may lead by now
            for peer in self.peers:
                peer.last_heard += gap
        if self.keeper.is_superseded:
            self._depose("another agent leads this run now")
            return
        if now - self.keeper.renewed > max(self.settings.silence_seconds * 0.6, gap + BEAT_SECONDS):
            self._depose("the lease of the run cannot be renewed: its file system does not answer")
            return
        is_beat = now - self._last_beat >= BEAT_SECONDS
        for peer in [peer for peer in self.peers if peer.link.closed]:
            self._receive(peer, now)  # before others connect, whose sockets may get the same numbers
        self._accept(now)
        # Each of many agents wakes this process once a beat: to read all their connections each time would take the square of them.
        ready = {key.fd for key, _ in self._selector.select(0)}
        for peer in list(self.peers):
            if is_beat or peer.descriptor in ready or peer.link.has_unsent:
                self._receive(peer, now)
        if is_beat:
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
        """When the wait for nodes began."""
        return self.group.waiting_since

    @property
    def events(self) -> Any:
        """What a poll shows as readable while a message or a connection waits."""
        return self._selector

    def close(self) -> None:
        """Disconnect from all agents. Unless the run is over, they end their ranks and look for another leader."""
        for peer in list(self.peers):
            self._drop(peer, "the leader has left")
        self._selector.close()
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
                self._drop(strangers[0], "too many others have connected since")
            peer = Peer(Link(sock, self._secret, LEADER), now, descriptor=sock.fileno())
            if not peer.link.closed:  # as of a connection that was reset before its greeting
                self.peers.append(peer)
                self._selector.register(peer.descriptor, selectors.EVENT_READ)

    def _drop(self, peer: Peer, reason: str) -> None:
        """Close a connection; nothing if it has been dropped since the list of them was read."""
        peer.link.close(reason)
        if peer not in self.peers:
            return
        self._selector.unregister(peer.descriptor)
        self.peers.remove(peer)
        if self._peer_of_node.get(peer.node) is peer:
            del self._peer_of_node[peer.node]

    def _receive(self, peer: Peer, now: float) -> None:
        for message in peer.link.receive():
            peer.last_heard = now
            self._follow(peer, message, now)
        silence = now - peer.last_heard
        if silence > (self.settings.silence_seconds if peer.node else PROOF_SECONDS):
            peer.link.close(f"{SILENT} for {silence:.0f} s")
        if peer.link.closed:
            is_newest = self._peer_of_node.get(peer.node) is peer
            self._drop(peer, peer.link.closed)
            if is_newest:
                self.group.lose(peer.node, peer.link.closed)

    def _follow(self, peer: Peer, message: Message, now: float) -> None:
        """Act on a message. Its sender has proven that it knows the secret, so it is an agent and its messages are well-formed."""
        if "hello" in message:
            peer.node = message["hello"]
            earlier = self._peer_of_node.get(peer.node)
            if earlier is not None and earlier is not peer:
                self._drop(earlier, "its agent was started again")
            self._peer_of_node[peer.node] = peer
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
        """Record a signal, and stop the run if a second node reports it too.

        A queue that wants the job to stop signals all its nodes; a signal to a single one of several only removes that node.
        """
        times = self._signals.get(name, {})
        recent_times = {other: time_of for other, time_of in times.items() if now - time_of < SAME_REQUEST_SECONDS}
        self._signals[name] = {node: now} | recent_times
        # Further nodes that report the same signal do not stop the run again.
        if node not in recent_times and len(recent_times) + 1 == min(2, len(self.group.members)):
            self._received.append(name)
            self.group.stop(name)

    def _obey_stop_file(self) -> None:
        """Obey the stop file while no rank runs; otherwise the ranks look for it."""
        if self.group.attempt is None and not self.group.is_over and (self.run_dir / STOP_FILE).exists():
            (self.run_dir / STOP_FILE).unlink(missing_ok=True)
            self._received.append(STOP_REASON)
            self.group.stop(STOP_REASON)

    def _depose(self, reason: str) -> None:
        self.is_deposed = True
        self.close()  # before the message, which waits for a file system that may not answer
        self._message(f"dstune: {self.node} does not lead any more: {reason}")

    def _yield(self) -> None:
        """Let another node lead: the network may have cut this one off, although it still reaches the file system."""
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
        nodes = ", ".join(f"{share.node} ({share.ranks})" for share in attempt.shares)
        self._message(f"dstune: starting {attempt.size} rank{'s' * (attempt.size > 1)} on {nodes}")
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
        if decision.wait is not None:
            return decision.wait
        final_verdict = decision.verdict
        if final_verdict.exit_code == EXIT_FAILED and attempt.lost and self._goes_back_to_queue(attempt):
            final_verdict = Verdict(EXIT_PREEMPTED, f"{verdict.reason}: the job goes back to the queue")
        self._finish(final_verdict, attempt)
        return None

    def give_up(self, reason: str, *, stopped: bool) -> None:
        is_resumable = stopped or self._goes_back_to_queue(None)
        self._finish(Verdict(EXIT_PREEMPTED if is_resumable else EXIT_FAILED, reason))

    def _goes_back_to_queue(self, attempt: Attempt | None) -> bool:
        """Return whether a job that lost nodes asks the queue for others.

        It does so if a node fell silent or if training has made progress. A job whose agents end as soon as they start must not
        return to the queue, since it would do so forever.
        """
        has_silent_node = attempt is not None and any(SILENT in cause for cause in attempt.lost.values())
        return self.settings.requeues and (has_silent_node or self._last_step() > self._first_step)

    def _last_step(self) -> int:
        return int(records.read_metrics(self.run_dir).last.get("step", 0))

    def last_lines(self, rank: int, count: int = attempts.TAIL_LINES) -> list[str]:
        """Return the last lines that `rank` wrote during this attempt."""
        return attempts.last_lines(attempts.log_path(self.run_dir, rank), self._log_starts.get(rank, 0), count)

    def _judge(self, attempt: Attempt, stop_signal: str | None, forced: bool) -> Verdict:
        errors = attempts.read_errors(self.run_dir, attempt.size)
        result = records.read_result(self.run_dir)
        if attempt.lost and not forced:
            user_error = next((error for error in errors.values() if isinstance(error, UserError)), None)
            if user_error is not None:
                return Verdict(user_error.exit_code, str(user_error), None, user_error)
            if result is None or result.get("status") not in ("completed", "stopped", "pruned"):
                losses = "; ".join(f"{node} was lost ({cause})" for node, cause in sorted(attempt.lost.items()))
                return Verdict(EXIT_FAILED, losses)
        disconnected = attempts.disconnected(attempt.ended, self.last_lines)
        verdict = judge(attempt.ended, errors, stop_signal, forced, attempt.stopped, disconnected)
        if verdict.exit_code == EXIT_DONE and result is None:
            return Verdict(EXIT_FAILED, "the ranks ended without a result")
        if verdict.culprit is not None and not isinstance(verdict.error, UserError):
            rank = verdict.culprit.rank
            culprit = f"rank {rank} on {attempt.node_of(rank)}"
            reason = verdict.reason.removeprefix(f"rank {rank} ")
            separator = ": " if reason == verdict.reason else " "
            return replace(verdict, reason=f"{culprit}{separator}{reason}")
        return verdict

    def _finish(self, verdict: Verdict, attempt: Attempt | None = None) -> None:
        failure = None
        if verdict.exit_code == EXIT_FAILED:
            culprit = verdict.culprit
            culprit_node = attempt.node_of(culprit.rank) if attempt and culprit else None
            lost_nodes = sorted(attempt.lost) if attempt else []
            failure = {
                "rank": culprit and culprit.rank,
                "node": culprit_node or next(iter(lost_nodes), None),
                "cause": verdict.reason,
            }
        with suppress(OSError):
            if failure is not None:  # a rank that was ended because of the failure may have recorded a requested stop
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
        if node in self._peer_of_node:
            self._peer_of_node[node].link.send(message)

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
        if status != self._written_status:
            with suppress(OSError):
                records.write_json(self.run_dir / GROUP_FILE, asdict(status))
                self._written_status = status
