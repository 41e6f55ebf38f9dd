"""The agent of one node. It starts the node's ranks when the leader says so, ends them when the leader is gone, and becomes the
leader itself if nobody else holds the lease."""

from __future__ import annotations

import select
import socket
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from dstune.core import files
from dstune.core.errors import DstuneError
from dstune.core.lease import Lease, LeaseRecord
from dstune.core.rendezvous import own_address
from dstune.launch.agents.leader import BEAT_SECONDS, MESSAGES, PAUSE_SECONDS, Leader, LeaseKeeper
from dstune.launch.agents.ranks import NodeLaunch
from dstune.launch.agents.task import Task
from dstune.launch.agents.wire import Link, Message, connect
from dstune.launch.console import Console
from dstune.launch.local.warm import ForkServer, fork_server
from dstune.launch.processes import end_all
from dstune.launch.signals import caught_signals

POLL_SECONDS = 0.05
CONNECT_SECONDS = 3.0
RETRY_SECONDS = 0.5
"""Time between two attempts to reach the leader."""
LEAVING_SECONDS = 5.0
"""How long the leader waits until the other agents have heard that the run is over."""
DOUBT_SECONDS = 3 * BEAT_SECONDS
"""Once the leader has been silent for this long, an agent watches the lease too, to know how long that stays unchanged."""
TURN_SECONDS = 2.0
"""Delay between one node's attempt to take a lease that nobody holds and that of the next node in order."""
LAST_TURN = 4
"""The turn that all further nodes share: only one of them gets the lease, and of a hundred nodes a third may be lost at once."""


class Agent:
    """Takes part in a run for one node.

    holder: identity of the process that restarts this agent when it is killed. dead_holder: identity of such a process that is
    known to have ended; this agent may take over its lease at once.
    """

    def __init__(self, task: Task, holder: str, dead_holder: str = ""):
        self.task, self.holder, self._dead_holder = task, holder, dead_holder
        self.run_dir = Path(task.run_dir)
        self.lease = Lease(self.run_dir)
        self.leader: Leader | None = None
        self.is_over = False
        self.left_alone: int | None = None
        """Exit code of the run if this node led it to its end after the node that runs the job's script was lost; else None."""
        self.silence_seconds = task.settings.silence_seconds
        self._link: Link | None = None
        self._last_heard = self._last_beat = 0.0
        self._last_tick = time.monotonic()
        self._last_search = 0.0
        self._server: ForkServer | None = None
        self._launch: NodeLaunch | None = None
        self._thread: threading.Thread | None = None
        self._generation = 0
        self._has_reported_failure = False
        self._stops: list[str] = []
        """Signals that ask the running ranks to stop."""
        self._last_lease: tuple[int, LeaseRecord | None, int] = (-1, None, 0)
        self._lease_changed_at = self._last_tick
        self._signals_sent = 0
        self._complaint = ""
        self._waiting_since: float | None = None
        """When this node began to wait for the others, after it let them lead; None once ranks have started."""
        self._lead_not_before = 0.0

    # -- the life of an agent -----------------------------------------------------------------------------------------

    def run(self) -> None:
        """Take part until the run is over or SIGHUP asks this node to leave."""
        self._end_predecessors()
        settings = self.task.settings
        with (
            caught_signals(settings.signals) as received,
            fork_server(settings.imports, self._message, warm=settings.warm, restarts=settings.restarts) as server,
        ):
            self._server = server
            while not self.is_over and "SIGHUP" not in received:
                self.tick(time.monotonic(), received)
                self._wait()
            self._end_ranks()
        if self.leader is not None:
            if self.leader.outcome is not None:
                if self.task.batch_node and self.task.batch_node not in self.leader.group.members:
                    self.left_alone = self.leader.outcome.exit_code
                self._say_goodbye(self.leader)
            else:
                self.leader.keeper.release()
            self.leader.close()
        elif self._link is not None:
            self._link.close("it has left")

    def tick(self, now: float, received: Sequence[str] = ()) -> None:
        """Handle everything that is due at `now`. received: names of signals; a handler appends to it."""
        gap, self._last_tick = now - self._last_tick, now
        if gap > PAUSE_SECONDS:  # this process was suspended, and the messages of that time are still unread
            self._last_heard += gap
            self._lease_changed_at += gap
        if self.leader is not None:
            self.leader.tick(now)
            if self.leader.is_deposed:
                if self.leader.has_yielded:
                    self._waiting_since = self.leader.waiting_since
                    self._lead_not_before = now + TURN_SECONDS * (min(self.task.settings.expected, LAST_TURN) + 1)
                self.leader = None
        link = self._link
        is_doubtful = link is None or not link.is_proven or now - self._last_heard > DOUBT_SECONDS
        if is_doubtful and self.leader is None and now - self._last_search >= RETRY_SECONDS:
            self._last_search = now
            self._look_for_leader(now)
        if self._link is not None:
            self._receive(self._link, now, received)
        self._report()

    def _wait(self) -> None:
        sockets: list[Any] = [] if self._link is None or self._link.closed else [self._link]
        sockets += [] if self.leader is None else [self.leader.events]
        poll = select.poll()
        for sock in sockets:
            with suppress(OSError, ValueError):
                poll.register(sock.fileno(), select.POLLIN)
        poll.poll(1000 * POLL_SECONDS)

    # -- the leader ---------------------------------------------------------------------------------------------------

    def _receive(self, link: Link, now: float, received: Sequence[str]) -> None:
        for message in link.receive():
            self._last_heard = now
            self._follow(message)
        if now - self._last_heard > self.silence_seconds:
            link.close(f"the leader was silent for {now - self._last_heard:.0f} s")
        for name in received[self._signals_sent :]:
            if name != "SIGHUP":
                link.send({"signal": name})
        self._signals_sent = len(received)
        if now - self._last_beat >= BEAT_SECONDS:
            self._last_beat = now
            link.send({"alive": True})
        if link.closed and not self.is_over:
            self._link = None
            self._end_ranks()
            self._message(f"dstune: {self.task.node} has lost the leader ({link.closed}), and has ended its ranks")

    def _follow(self, message: Message) -> None:
        if "start" in message:
            self._start(message)
        elif "end" in message:
            if self._launch is not None and message["end"] == self._generation:
                self._launch.end_soon()
        elif "stop" in message:
            self._stops.append(message["stop"])
        elif "over" in message:
            self.is_over = True

    def _look_for_leader(self, now: float) -> None:
        """Connect to the holder of the lease, or take the lease if its holder is gone.

        A suspended process keeps its sockets, so an open connection does not prove that the leader is alive; only its messages
        and its lease do.
        """
        try:
            generation = self.lease.newest()
            record = self.lease.read(generation) if generation else None
            renewed = self.lease.renewed(generation) if generation else 0
        except OSError as error:
            self._complain(f"dstune: the lease of the run cannot be read: {error}")
            return
        lease_state = (generation, record, renewed)
        if lease_state != self._last_lease:
            self._last_lease, self._lease_changed_at = lease_state, now
        if record is not None and record.is_over and record.launch == self.task.launch:
            self.is_over = True
        elif self._link is not None and self._link.is_proven:
            return
        elif self._may_lead(generation, record, now):
            if self._link is not None:
                self._link.close("it sent no message")
            self._lead(generation, record, now)
        elif self._link is None and record is not None and not record.is_released:
            try:
                link = connect(record.address, record.port, self.task.secret, CONNECT_SECONDS)
            except OSError:
                return
            finally:
                # Waiting for a node that does not answer must not look like a suspension of this process.
                self._last_tick = time.monotonic()
            self._introduce(link)

    def _may_lead(self, generation: int, record: LeaseRecord | None, now: float) -> bool:
        if now < self._lead_not_before:
            return False
        unchanged = now - self._lease_changed_at
        turn = TURN_SECONDS * min(self.task.order, LAST_TURN)
        if generation == 0 or (record is not None and record.is_released):
            return unchanged >= turn
        if record is not None and record.holder in (self.holder, self._dead_holder):
            return True  # an earlier agent of this node held the lease, and is known to have ended
        return unchanged >= self.silence_seconds + turn

    def _lead(self, generation: int, former: LeaseRecord | None, now: float) -> None:
        interface = self.task.settings.interface
        address = own_address(interface)
        server = socket.create_server((address if interface else "", 0))
        earlier_term = former if former is not None and former.launch == self.task.launch and former.attempts else None
        attempts = earlier_term.attempts if earlier_term is not None else 0
        port = server.getsockname()[1]
        record = LeaseRecord(self.holder, self.task.node, address, port, "-", self.task.launch, attempts)
        try:
            own_generation = self.lease.take(generation, record)
        except OSError as error:
            self._complain(f"dstune: the lease of the run cannot be taken: {error}")
            own_generation = None
        if own_generation is None:
            server.close()
            return
        self._complaint = ""
        keeper = LeaseKeeper(self.lease, own_generation, record)
        keeper.start()
        settings, secret = self.task.settings, self.task.secret
        # A leader that yielded is not lost; if it leads again, it continues to wait for nodes.
        waiting_since = self._waiting_since
        lost_leader = earlier_term.node if earlier_term is not None and waiting_since is None else ""
        self.leader = Leader(
            self.run_dir,
            settings,
            secret,
            keeper,
            server,
            now if waiting_since is None else waiting_since,
            self.task.node,
            self._message,
            lost_leader,
            may_yield=waiting_since is None,
        )
        self._introduce(connect(address if interface else "127.0.0.1", record.port, secret, CONNECT_SECONDS))

    def _introduce(self, link: Link) -> None:
        link.send({"hello": self.task.node, "order": self.task.order, "ranks": self.task.ranks})
        self._link, self._last_heard = link, time.monotonic()

    def _say_goodbye(self, leader: Leader) -> None:
        deadline = time.monotonic() + LEAVING_SECONDS
        while time.monotonic() < deadline and any(not peer.link.closed for peer in leader.peers):
            for peer in leader.peers:
                peer.link.receive()
            if self._link is not None:
                self._link.close("it has left")
            time.sleep(POLL_SECONDS)

    # -- the ranks ----------------------------------------------------------------------------------------------------

    def _start(self, order: Message) -> None:
        self._end_ranks()
        self._generation, self._has_reported_failure, self._stops = order["start"], False, []
        self._waiting_since = None
        file = self.lease.file(self._generation)
        console = Console()
        first, size = order["first"], order["size"]
        launch = NodeLaunch(self.task, order["mark"], file, first, size, self._stops, console, self._server)
        self._launch = launch
        self._thread = threading.Thread(target=self._run_ranks, args=[launch], name="ranks", daemon=True)
        self._thread.start()

    def _run_ranks(self, launch: NodeLaunch) -> None:
        try:
            launch.run_ranks()
        except (OSError, DstuneError) as error:
            self._message(f"dstune: the ranks of {self.task.node} cannot be started: {error}")

    def _report(self) -> None:
        """Report to the leader that a rank failed, and how the ranks ended once all have."""
        launch, thread, link = self._launch, self._thread, self._link
        if launch is None or thread is None:
            return
        if launch.has_failed and not self._has_reported_failure and link is not None:
            self._has_reported_failure = True
            link.send({"failed": True, "generation": self._generation})
        if not thread.is_alive():
            self._launch = self._thread = None
            ends = [[end.rank, end.code, end.signalled_to_end] for end in launch.all_ends()]
            if link is not None:
                link.send({"ended": ends, "stopped": sorted(launch.stopped), "generation": self._generation})

    def _end_ranks(self) -> None:
        """End the running ranks, and wait until they are gone."""
        if self._launch is None or self._thread is None:
            return
        self._stops.extend(["the end of the run"] * 2)  # a second request ends them at once
        self._thread.join()
        self._launch = self._thread = None

    def _end_predecessors(self) -> None:
        """End the ranks that a killed agent has left on this node."""
        with suppress(OSError):
            record = self.lease.read(self.lease.newest())
            if record is not None and len(record.mark) > 8:
                end_all(record.mark)

    def _complain(self, text: str) -> None:
        """Report a problem once, although the attempt is repeated twice a second."""
        if text != self._complaint:
            self._complaint = text
            self._message(text)

    def _message(self, text: str) -> None:
        """Write `text` to the log of this agent and to the one that the command shows."""
        print(text, flush=True)
        with suppress(OSError, DstuneError), files.append(self.run_dir / "logs" / MESSAGES) as log:
            log.write(f"{text}\n".encode())
