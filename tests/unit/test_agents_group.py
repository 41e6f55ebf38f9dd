"""What the leader decides, event by event, by a clock of the test's own."""

from __future__ import annotations

import pytest

from dstune.launch.agents.group import JOIN_SECONDS, REJOIN_SECONDS, Attempt, Group, Member, Orders
from dstune.launch.verdict import Ended


class Noted(Orders):
    """Notes what is ordered. waits: what follows each attempt."""

    def __init__(self, *waits: float | None):
        self.started: list[list[str]] = []
        self.ended: list[str] = []
        self.stopped: list[str] = []
        self.given_up: str | None = None
        self.lost: list[list[str]] = []
        self._waits = list(waits)

    def start(self, attempt: Attempt) -> None:
        self.started.append([f"{share.node}:{share.first_rank}+{share.ranks}" for share in attempt.shares])

    def end(self, node: str) -> None:
        self.ended.append(node)

    def stop(self, node: str, signal_name: str) -> None:
        self.stopped.append(node)

    def after(self, attempt: Attempt, stop_signal: str | None, *, forced: bool) -> float | None:
        self.lost.append(sorted(attempt.lost))
        return self._waits.pop(0) if self._waits else None

    def give_up(self, reason: str, *, stopped: bool) -> None:
        self.given_up = reason


def group_of(
    orders: Noted, *, wanted: int = 2, min_nodes: int | None = None, members: int = 2, ranks: int = 2
) -> Group:
    group = Group(wanted, min_nodes or wanted, orders, 0.0, message=lambda text: None)
    for number in range(members):
        group.join(member(number, ranks))
    return group


def member(number: int, ranks: int = 2) -> Member:
    return Member(f"node{number + 1}", number, ranks)


def ended(*codes: int, first: int = 0) -> list[Ended]:
    return [Ended(first + place, code, 0) for place, code in enumerate(codes)]


def test_all_nodes_start_together_in_their_order():
    orders = Noted()
    group = Group(2, 2, orders, 0.0, message=lambda text: None)
    group.join(member(1))
    group.tick(1.0)
    assert not orders.started
    group.join(member(0))
    group.tick(2.0)
    assert orders.started == [["node1:0+2", "node2:2+2"]]
    for number in (0, 1):
        group.report(f"node{number + 1}", ended(0, 0, first=2 * number), [])
    group.tick(3.0)
    assert group.is_over
    assert not orders.ended


def test_a_spare_does_not_begin_in_the_place_of_a_node_that_is_a_moment_late():
    for late in (True, False):
        orders = Noted()
        group = Group(2, 2, orders, 0.0, message=lambda text: None, expected=3)
        for number in (0, 2):
            group.join(member(number))
        group.tick(1.0)
        assert not orders.started
        if late:
            group.join(member(1))
        group.tick(REJOIN_SECONDS)
        assert orders.started == [["node1:0+2", "node2:2+2" if late else "node3:2+2"]]


def test_a_dead_rank_ends_the_others_and_all_start_again_without_a_wait():
    orders = Noted(0.0)
    group = group_of(orders)
    group.tick(1.0)
    group.fail("node2")
    assert orders.ended == ["node1", "node2"]
    group.report("node2", ended(-9, 1, first=2), [])
    group.tick(1.5)
    assert len(orders.started) == 1  # node1 still ends its ranks
    group.report("node1", ended(1, 1), [])
    group.tick(2.0)
    group.tick(2.1)
    assert orders.started[1] == orders.started[0]


def test_a_lost_node_is_replaced_by_a_spare():
    orders = Noted(0.0)
    group = group_of(orders, members=3)
    group.tick(1.0)
    assert orders.started == [["node1:0+2", "node2:2+2"]]
    group.lose("node1", "its connection was closed")
    group.tick(1.1)
    assert orders.ended == ["node2"]
    group.report("node2", ended(-9, -9, first=2), [])
    group.tick(1.2)
    group.tick(1.3)
    assert orders.lost == [["node1"]]
    assert orders.started[1] == ["node2:0+2", "node3:2+2"]


def test_fewer_nodes_go_on_where_they_may_after_a_moment_for_the_lost_one():
    orders = Noted(0.0, 0.0)
    group = group_of(orders, min_nodes=1)
    group.tick(1.0)
    group.lose("node2", "it was silent")
    group.report("node1", ended(-9, -9), [])
    group.tick(2.0)
    group.tick(2.0 + REJOIN_SECONDS / 2)
    assert len(orders.started) == 1
    group.tick(2.0 + REJOIN_SECONDS)
    assert orders.started[1] == ["node1:0+2"]
    group.join(member(1))  # back: it waits
    group.tick(9.0)
    assert len(orders.started) == 2
    group.report("node1", ended(-9, -9), [])
    group.tick(10.0)
    group.tick(10.0)
    assert orders.started[2] == ["node1:0+2", "node2:2+2"]


def test_too_few_nodes_wait_and_then_give_up():
    orders = Noted(0.0)
    group = group_of(orders)
    group.tick(1.0)
    group.lose("node2", "it was silent")
    group.report("node1", ended(-9, -9), [])
    group.tick(2.0)
    group.tick(1.9 + JOIN_SECONDS)
    assert orders.given_up is None
    group.tick(2.0 + JOIN_SECONDS)
    assert orders.given_up is not None
    assert group.is_over
    assert len(orders.started) == 1


def test_an_agent_that_was_started_again_has_lost_its_ranks():
    orders = Noted(0.0)
    group = group_of(orders)
    group.tick(1.0)
    group.join(member(1))
    group.tick(1.1)
    assert orders.ended == ["node1"]
    group.report("node1", ended(-9, -9), [])
    group.tick(1.2)
    group.tick(1.3)
    assert orders.lost == [["node2"]]
    assert orders.started[1] == orders.started[0]


def test_a_pause_before_the_next_attempt_is_kept():
    orders = Noted(20.0)
    group = group_of(orders)
    group.tick(1.0)
    for number in (0, 1):
        group.report(f"node{number + 1}", ended(1, 1, first=2 * number), [])
    group.tick(2.0)
    group.tick(21.9)
    assert len(orders.started) == 1
    group.tick(22.0)
    assert len(orders.started) == 2


def test_a_request_to_stop_reaches_all_nodes_or_ends_the_wait():
    orders = Noted(None)
    group = group_of(orders)
    group.tick(1.0)
    group.stop("SIGUSR1")
    assert orders.stopped == ["node1", "node2"]
    assert not group.forced
    group.stop("SIGUSR1")
    assert group.forced

    orders = Noted()
    group = group_of(orders, members=1)
    group.stop("SIGTERM")
    group.tick(1.0)
    assert orders.given_up is not None
    assert not orders.started


@pytest.mark.parametrize("late", ["report", "fail"])
def test_what_a_lost_node_says_later_changes_nothing(late):
    orders = Noted(0.0)
    group = group_of(orders, members=3)
    group.tick(1.0)
    group.lose("node2", "it was silent")
    group.tick(1.1)
    if late == "report":
        group.report("node2", ended(-9, -9, first=2), [])
    else:
        group.fail("node2")
    assert orders.ended == ["node1"]
    assert group.attempt is not None
    assert not group.attempt.ended
