"""The decisions of the leader: which nodes train together, when an attempt has failed, and what happens next. This module touches
no socket, file or clock: events and the time come in, orders for agents go out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from dstune.core.errors import EXIT_DONE, EXIT_PREEMPTED
from dstune.launch.verdict import Ended

REJOIN_SECONDS = 3.0
"""How long the next attempt waits for an agent that has just gone; the keeper of a killed agent restarts it at once."""
JOIN_SECONDS = 300.0
"""How long an attempt waits for nodes without which it cannot start."""


@dataclass(frozen=True)
class Share:
    """The ranks of one node in an attempt."""

    node: str
    first_rank: int
    ranks: int


@dataclass
class Member:
    """A node whose agent is connected."""

    node: str
    order: int
    """Position among all nodes of the run: the first ones train, later ones are spares."""
    ranks: int
    """Number of ranks that the node runs when it trains."""


@dataclass
class Attempt:
    """One start of all ranks."""

    shares: list[Share]
    ended: list[Ended] = field(default_factory=list)
    """How ranks ended, in the order of the reports."""
    running: set[str] = field(default_factory=set)
    """Nodes whose ranks may still run."""
    lost: dict[str, str] = field(default_factory=dict)
    """Nodes that were lost during the attempt, with the cause."""
    stopped: set[int] = field(default_factory=set)
    """Ranks that were suspended (SIGSTOP)."""
    is_ending: bool = False
    """Whether the running nodes have been ordered to end their ranks."""

    @property
    def size(self) -> int:
        return sum(share.ranks for share in self.shares)

    def node_of(self, rank: int) -> str:
        return next(share.node for share in self.shares if share.first_rank <= rank < share.first_rank + share.ranks)


class Orders:
    """The orders that a group gives; the leader sends them to the agents."""

    def start(self, attempt: Attempt) -> None:
        """Start the ranks of `attempt` on its nodes."""
        raise NotImplementedError

    def end(self, node: str) -> None:
        """End the ranks of `node`, because others are gone."""
        raise NotImplementedError

    def stop(self, node: str, signal_name: str) -> None:
        """Ask the ranks of `node` to save and exit; the second time, end them at once."""
        raise NotImplementedError

    def after(self, attempt: Attempt, stop_signal: str | None, *, forced: bool) -> float | None:
        """Judge an attempt that has ended. Return the seconds until the next one starts, or None if the run is over."""
        raise NotImplementedError

    def give_up(self, reason: str, *, stopped: bool) -> None:
        """End the run while no rank runs, because a signal asked for it (`stopped`) or because nodes are missing."""
        raise NotImplementedError


class Group:
    """The nodes of one run, as their leader sees them.

    target_nodes: nodes that train together if all are there. min_nodes: the fewest that training continues with.
    rejoin_seconds: how long too few nodes wait for lost ones. expected: nodes that start an agent, spares included.
    """

    def __init__(
        self,
        target_nodes: int,
        min_nodes: int,
        orders: Orders,
        now: float,
        *,
        message: Callable[[str], None],
        rejoin_seconds: float = JOIN_SECONDS,
        expected: int = 0,
    ):
        self.target_nodes, self.min_nodes = target_nodes, min_nodes
        self.members: dict[str, Member] = {}
        self.attempt: Attempt | None = None
        self.is_over = False
        self.stop_signal: str | None = None
        self.forced = False
        self._orders, self._message = orders, message
        self.waiting_since = now
        """When the ranks last stopped running."""
        self._not_before = now
        self._settle_seconds = self._give_up_seconds = JOIN_SECONDS
        """How long to wait before an attempt starts with fewer nodes than `target_nodes`; before the run ends with fewer than
        `min_nodes`."""
        self._rejoin_seconds = rejoin_seconds
        self._expected = expected
        """Nodes that the next attempt waits for briefly, so that a spare that connects early does not replace a slower node."""
        self._announced = ""
        self._expects_return = False

    def expect_soon(self) -> None:
        """Wait only briefly for the nodes that were connected before; those that do not return soon count as lost."""
        self._expects_return = True
        self._settle_seconds, self._give_up_seconds, self._expected = REJOIN_SECONDS, self._rejoin_seconds, 0

    def join(self, member: Member) -> None:
        """Record that an agent has connected; its node runs no rank yet."""
        if self.attempt is not None and member.node in self.attempt.running:
            self.lose(member.node, "its agent was started again")
        self.members[member.node] = member

    def lose(self, node: str, cause: str) -> None:
        """Record that the agent of `node` is gone. cause: why, such as a closed connection or silence."""
        self.members.pop(node, None)
        if self.attempt is not None and node in self.attempt.running:
            self.attempt.running.discard(node)
            self.attempt.lost[node] = cause
            self._message(f"dstune: {node} was lost ({cause})")

    def report(self, node: str, ended: Sequence[Ended], stopped: Sequence[int]) -> None:
        """Record that all ranks of `node` have ended."""
        if self.attempt is None or node not in self.attempt.running:
            return
        for end in ended:
            self.attempt.ended.append(Ended(end.rank, end.code, len(self.attempt.ended), end.signalled_to_end))
        self.attempt.stopped.update(stopped)
        self.attempt.running.discard(node)

    def fail(self, node: str) -> None:
        """End the ranks of all nodes, because one of `node` failed."""
        if self.attempt is not None and node in self.attempt.running:
            self._end_nodes()

    def stop(self, signal_name: str) -> None:
        """Ask the run to stop: the first time to save and exit, the second time to end at once."""
        self.forced = self.stop_signal is not None
        self.stop_signal = self.stop_signal or signal_name
        for node in sorted(self.attempt.running) if self.attempt is not None else ():
            self._orders.stop(node, signal_name)

    def tick(self, now: float) -> None:
        """Act on what has happened until `now`: start, end or judge an attempt."""
        if self.is_over:
            return
        if self.attempt is None:
            self._start_if_ready(now)
            return
        attempt = self.attempt
        if attempt.running:
            if attempt.lost or any(end.code not in (EXIT_DONE, EXIT_PREEMPTED) for end in attempt.ended):
                self._end_nodes()
            return
        wait = self._orders.after(attempt, self.stop_signal, forced=self.forced)
        self.attempt = None
        if wait is None:
            self.is_over = True
            return
        self.waiting_since, self._not_before = now, now + wait
        self.expect_soon()

    def lacks_nodes(self, now: float, seconds: float) -> bool:
        """Return whether, for at least `seconds`, fewer than `min_nodes` of the nodes that were connected before have returned."""
        is_waiting = self.attempt is None and not self.is_over and self.stop_signal is None
        waited = now - self.waiting_since
        are_missing = self._expects_return and len(self.members) < self.min_nodes
        return is_waiting and are_missing and seconds <= waited < self._give_up_seconds

    def _end_nodes(self) -> None:
        assert self.attempt is not None
        if not self.attempt.is_ending:
            self.attempt.is_ending = True
            for node in sorted(self.attempt.running):
                self._orders.end(node)

    def _start_if_ready(self, now: float) -> None:
        members = sorted(self.members.values(), key=lambda member: member.order)
        waited = now - self.waiting_since
        if self.stop_signal is not None:
            self._give_up(f"received {self.stop_signal} while no rank was running", stopped=True)
        elif len(members) < self.min_nodes and waited >= self._give_up_seconds:
            count = f"{len(members)} of {self.target_nodes} nodes are there after {self._give_up_seconds:.0f} s"
            self._give_up(f"{count}, and {self.min_nodes} are needed", stopped=False)
        elif now >= self._not_before and (
            len(members) >= max(self.target_nodes, self._expected)
            or (len(members) >= self.target_nodes and waited >= REJOIN_SECONDS)
            or (len(members) >= self.min_nodes and waited >= self._settle_seconds)
        ):
            self._start(members[: self.target_nodes])
        elif waited >= REJOIN_SECONDS and len(members) < self.min_nodes:
            self._announce(f"dstune: waiting for nodes: {len(members)} of {self.target_nodes} are there")

    def _start(self, members: Sequence[Member]) -> None:
        shares: list[Share] = []
        first_rank = 0
        for member in members:
            shares.append(Share(member.node, first_rank, member.ranks))
            first_rank += member.ranks
        self.attempt = Attempt(shares, running={share.node for share in shares})
        self._announced = ""
        self._orders.start(self.attempt)

    def _give_up(self, reason: str, *, stopped: bool) -> None:
        self.is_over = True
        self._orders.give_up(reason, stopped=stopped)

    def _announce(self, text: str) -> None:
        if text != self._announced:
            self._announced = text
            self._message(text)
