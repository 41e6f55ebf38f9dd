"""Strangers on the network, and groups of nodes that a partition cut off: neither takes part in a run."""

from __future__ import annotations

import socket
import struct
import time
from pathlib import Path

import pytest

from dstune.core.lease import Lease, LeaseRecord
from dstune.launch.agents.group import Member
from dstune.launch.agents.leader import Leader, LeaseKeeper
from dstune.launch.agents.task import Settings
from dstune.launch.agents.wire import connect

SETTINGS = Settings(nodes=1, expected=1, min_nodes=1, restarts=1, silence_seconds=15.0, grace_seconds=1.0)


@pytest.fixture
def leader(tmp_path: Path) -> Leader:
    server = socket.create_server(("127.0.0.1", 0))
    (tmp_path / "launch").mkdir()
    lease = Lease(tmp_path)
    record = LeaseRecord("holder", "node1", "127.0.0.1", server.getsockname()[1], "-", "job")
    generation = lease.take(0, record)
    assert generation == 1
    keeper = LeaseKeeper(lease, generation, record)
    return Leader(tmp_path, SETTINGS, "secret", keeper, server, time.monotonic(), "node1", lambda text: None)


def test_a_stranger_is_hung_up_on_before_a_message_counts(leader: Leader) -> None:
    port = leader.keeper.record.port
    for secret in ("another", "secret"):
        link = connect("127.0.0.1", port, secret, 1.0)
        link.send({"hello": "node1", "order": 0, "ranks": 1})
        leader.tick(time.monotonic())
        assert len(leader.peers) == 1
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline and leader.peers and not leader.group.members:
            link.receive()
            leader.tick(time.monotonic())
        assert bool(leader.group.members) == (secret == "secret")
        assert bool(leader.group.attempt) == (secret == "secret")
    leader.close()


def test_strangers_who_say_nothing_are_let_go(leader: Leader) -> None:
    silent = [socket.create_connection(("127.0.0.1", leader.keeper.record.port)) for _ in range(20)]
    now = time.monotonic()
    leader.tick(now)
    assert len(leader.peers) == 20
    for second in range(1, 12):
        leader.keeper.renewed = now + second
        leader.tick(now + second)
    assert not leader.peers
    for connection in silent:
        connection.close()
    leader.close()


def test_a_leader_whose_lease_was_taken_over_leads_no_more(leader: Leader, tmp_path: Path) -> None:
    lease = Lease(tmp_path)
    assert lease.take(1, LeaseRecord("other", "node2", "127.0.0.1", 1, "-", "job")) == 2
    leader.keeper.renew()
    leader.tick(time.monotonic())
    assert leader.is_deposed
    assert leader.group.attempt is None
    record = lease.read(2)
    assert record is not None
    assert record.holder == "other"


def test_a_leader_that_cannot_renew_its_lease_steps_down_before_another_may_take_it(leader: Leader) -> None:
    now = leader.keeper.renewed
    for tenths in range(1, 200):
        leader.tick(now + tenths / 10)
        if leader.is_deposed:
            break
    assert leader.is_deposed
    assert tenths / 10 < SETTINGS.silence_seconds - 5


def test_a_signal_counts_once_and_where_all_nodes_get_it(leader: Leader) -> None:
    asked: list[str] = []
    leader.group.stop = asked.append  # type: ignore[method-assign]
    for number in range(3):
        leader.group.join(Member(f"node{number + 1}", number, 1))
    leader._note_signal("SIGTERM", "node3", 1.0)  # SLURM takes one node out of a job
    leader._note_signal("SIGTERM", "node3", 2.0)
    assert not asked
    for number, now in ((1, 20.0), (2, 20.1), (3, 20.2), (1, 20.3)):
        leader._note_signal("SIGUSR1", f"node{number}", now)
    assert asked == ["SIGUSR1"]
    for number in (1, 2, 3):
        leader._note_signal("SIGUSR1", f"node{number}", 30.0)
    assert asked == ["SIGUSR1"] * 2
    leader.close()


def test_a_connection_that_is_reset_at_once_does_not_end_the_leader(leader: Leader) -> None:
    """As those of a port scanner: its socket is closed before the leader has written to it, and its number is used again."""
    address = ("127.0.0.1", leader.keeper.record.port)
    for _ in range(3):
        reset = [socket.create_connection(address) for _ in range(5)]
        for connection in reset:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            connection.close()
        leader.tick(time.monotonic())
        leader.tick(time.monotonic())
        assert not leader.peers
    silent = socket.create_connection(address)
    leader.tick(time.monotonic())
    (peer,) = leader.peers
    peer.link.close("Broken pipe")  # as after a message that could not be sent
    another = socket.create_connection(address)
    leader.tick(time.monotonic())
    assert [each.link.closed for each in leader.peers] == [""]
    silent.close()
    another.close()
    leader.close()
