"""Messages between agents over loopback: whole, in order, and from those who know the secret alone."""

from __future__ import annotations

import socket
import time

import pytest

from dstune.launch.agents.wire import AGENT, LEADER, Link


def pair(secret: str = "secret", other: str = "secret") -> tuple[Link, Link]:
    left, right = socket.socketpair()
    return Link(left, secret, LEADER), Link(right, other, AGENT)


def received(link: Link, others: Link, count: int = 1, seconds: float = 5.0) -> list[dict]:
    messages: list[dict] = []
    deadline = time.monotonic() + seconds
    while len(messages) < count and not link.closed and time.monotonic() < deadline:
        others.receive()
        messages += link.receive()
    return messages


def test_messages_arrive_whole_and_in_order():
    leader, agent = pair()
    for number in range(50):
        agent.send({"number": number, "text": "x" * 20_000})
    assert [message["number"] for message in received(leader, agent, 50)] == list(range(50))
    assert leader.is_proven
    leader.send({"start": 1})
    assert received(agent, leader) == [{"start": 1}]


def test_another_secret_is_refused_by_both_ends():
    leader, agent = pair(other="other")
    agent.send({"hello": "node1"})
    assert received(leader, agent) == []
    assert leader.closed
    assert not leader.is_proven
    assert received(agent, leader) == []
    assert agent.closed


@pytest.mark.parametrize("data", [b"GET / HTTP/1.1\r\n\r\n", b"x" * 100_000, b"\n\n\n", b"\xff" * 32 + b"\n{}\n"])
def test_strangers_are_refused(data):
    left, right = socket.socketpair()
    leader = Link(left, "secret", LEADER)
    right.sendall(data)
    deadline = time.monotonic() + 5
    while not leader.closed and time.monotonic() < deadline:
        assert leader.receive() == []
    assert leader.closed


def test_a_message_cannot_be_changed_repeated_or_sent_back():
    for change in ("change", "repeat", "reflect"):
        left, middle_left = socket.socketpair()
        middle_right, right = socket.socketpair()
        leader, agent = Link(left, "secret", LEADER), Link(right, "secret", AGENT)
        for source, target in ((middle_left, middle_right), (middle_right, middle_left)):
            target.sendall(source.recv(65536))  # nonces
        agent.receive()
        agent.send({"ranks": 1})
        greeting, line, _ = middle_right.recv(65536).split(b"\n")
        assert leader.receive() == []
        if change == "change":
            middle_left.sendall(greeting + b"\n" + line.replace(b"1}", b"2}") + b"\n")
        elif change == "repeat":
            middle_left.sendall(b"\n".join([greeting, line, line, b""]))
        else:
            middle_left.sendall(middle_left.recv(65536))
        expected = [{"ranks": 1}] if change == "repeat" else []
        assert leader.receive() == expected
        assert leader.closed, change


def test_the_end_of_a_connection_is_seen_at_once():
    leader, agent = pair()
    agent.send({"hello": "node1"})
    assert received(leader, agent)
    agent.close("it has left")
    assert leader.receive() == []
    assert leader.closed
