"""Agents over loopback with ranks that train nothing: what is killed comes back, and one group trains at a time."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from dstune.core.errors import TrainingFailed
from dstune.core.lease import LEASE, Lease, LeaseRecord, refuse_if_superseded
from dstune.launch import records
from dstune.launch.agents import wire
from dstune.launch.agents.agent import Agent
from dstune.launch.agents.leader import PAUSE_SECONDS
from dstune.launch.agents.task import Settings, Task

ROOT = Path(__file__).parents[2]
SETTINGS = Settings(
    nodes=2, expected=2, min_nodes=2, restarts=9, silence_seconds=15.0, grace_seconds=0.5, interface="lo"
)


def task_for(run_dir: Path, number: int, **settings: Any) -> Task:
    return Task(
        run_dir=str(run_dir),
        command=["tests.support.stub_rank", str(run_dir)],
        settings=replace(SETTINGS, **settings),
        node=f"node{number + 1}",
        order=number,
        ranks=1,
        launch="job",
        secret="secret",
        variables={"PYTHONPATH": str(ROOT)},
    )


class Nodes:
    """Agents in this process, which do something whenever the test waits."""

    def __init__(self, run_dir: Path, count: int, **settings: Any):
        self.run_dir = run_dir
        self.settings = settings
        self.agents = {f"node{number + 1}": self.agent(number) for number in range(count)}
        self.stopped: set[str] = set()

    def agent(self, number: int, holder: str = "") -> Agent:
        return Agent(task_for(self.run_dir, number, **self.settings), holder or f"keeper {number}")

    def wait(self, condition: Callable[[], Any], seconds: float = 30.0) -> Any:
        deadline = time.monotonic() + seconds
        while not (reached := condition()):
            assert time.monotonic() < deadline, self.log()
            for name, agent in self.agents.items():
                if name not in self.stopped and not agent.is_over:
                    agent.tick(time.monotonic())
            time.sleep(0.01)
        return reached

    def kill(self, name: str) -> Agent:
        """As a SIGKILL of the agent's process: its sockets are closed, and its ranks die with it."""
        agent = self.agents.pop(name)
        if agent.leader is not None:
            agent.leader.keeper.ended.set()
            agent.leader.close()
        if agent._link is not None:
            agent._link.close("killed")
        agent._end_ranks()
        return agent

    def places(self, *ranks: int, size: int, after: int = 0) -> Callable[[], int]:
        """Whether exactly these ranks are there, of a generation after `after`: its number."""

        def there() -> int:
            found = [self.place(rank) for rank in ranks]
            generations = {place[1] for place in found if place}
            same = all(place and place[0] == size for place in found) and len(generations) == 1
            return generations.pop() if same and min(generations) > after else 0

        return there

    def place(self, rank: int) -> list[int]:
        try:
            return json.loads((self.run_dir / f"place-{rank}").read_text())
        except OSError:
            return []

    @property
    def leader(self) -> str:
        return next(name for name, agent in self.agents.items() if agent.leader is not None)

    def log(self) -> str:
        log = self.run_dir / "logs" / "launch.log"
        return log.read_text() if log.exists() else ""


@pytest.fixture
def run_dir(tmp_path: Path) -> Iterator[Path]:
    (tmp_path / "logs").mkdir()
    (tmp_path / "launch").mkdir()
    yield tmp_path
    left = [process for process in psutil.process_iter() if str(tmp_path) in _words(process)]
    for process in left:
        process.kill()
    assert not left


def _words(process: psutil.Process) -> list[str]:
    try:
        return [] if process.status() == psutil.STATUS_ZOMBIE else process.cmdline()
    except psutil.Error:
        return []


def fork_server_of(keeper: subprocess.Popen[bytes]) -> psutil.Process | None:
    """The process with the imports that the process of a node offers to its agents."""
    title = f"dstune: fork server of process {keeper.pid}"
    return next((process for process in psutil.process_iter() if " ".join(_words(process)).startswith(title)), None)


def is_forked(rank: int) -> bool:
    return "dstune: keeper of rank process" in " ".join(psutil.Process(rank).parent().cmdline())


def finish(nodes: Nodes) -> dict[str, Any]:
    (nodes.run_dir / "finish").touch()
    nodes.wait(lambda: all(agent.is_over for agent in nodes.agents.values()))
    for agent in nodes.agents.values():
        if agent.leader is not None:
            agent.leader.close()
    return records.read_json(nodes.run_dir / "result.json") or {}


def test_a_killed_rank_starts_all_again_and_the_run_ends(run_dir):
    nodes = Nodes(run_dir, 2)
    first = nodes.wait(nodes.places(0, 1, size=2))
    began = time.monotonic()
    (run_dir / "die-1").touch()
    second = nodes.wait(nodes.places(0, 1, size=2, after=first))
    print(f"started again after {time.monotonic() - began:.1f} s")
    assert second == first + 1
    assert finish(nodes)["status"] == "completed"
    assert "rank 1 on node2 was killed by SIGKILL" in nodes.log()


def test_a_failure_names_rank_node_and_cause(run_dir):
    nodes = Nodes(run_dir, 2, restarts=0)
    nodes.wait(nodes.places(0, 1, size=2))
    (run_dir / "die-1").touch()
    nodes.wait(lambda: all(agent.is_over for agent in nodes.agents.values()))
    nodes.agents["node1"].leader.close()
    result = records.read_json(run_dir / "result.json")
    assert (result["status"], result["failure"]["rank"], result["failure"]["node"]) == ("failed", 1, "node2")
    assert "SIGKILL" in result["failure"]["cause"]


def test_a_spare_takes_the_place_of_a_killed_node(run_dir):
    nodes = Nodes(run_dir, 3, expected=3)
    first = nodes.wait(nodes.places(0, 1, size=2))
    nodes.kill("node2")
    nodes.wait(nodes.places(0, 1, size=2, after=first))
    assert "starting 2 ranks on node1 (1), node3 (1)" in nodes.log()
    assert finish(nodes)["status"] == "completed"


def test_an_agent_that_its_keeper_starts_again_leads_at_once(run_dir):
    nodes = Nodes(run_dir, 2)
    first = nodes.wait(nodes.places(0, 1, size=2))
    assert nodes.leader == "node1"
    nodes.kill("node1")
    nodes.agents["node1"] = nodes.agent(0)
    began = time.monotonic()
    nodes.wait(nodes.places(0, 1, size=2, after=first))
    assert time.monotonic() - began < SETTINGS.silence_seconds - 3
    assert nodes.leader == "node1"
    assert finish(nodes)["status"] == "completed"


def test_a_lost_leader_ends_the_run_where_nothing_restarts(run_dir):
    nodes = Nodes(run_dir, 2, restarts=0)
    nodes.wait(nodes.places(0, 1, size=2))
    nodes.kill("node1")
    nodes.agents["node1"] = nodes.agent(0)
    nodes.wait(lambda: all(agent.is_over for agent in nodes.agents.values()))
    nodes.agents["node1"].leader.close()
    assert records.read_json(run_dir / "result.json")["status"] == "failed"
    assert Lease(run_dir).newest() == 3  # taken, started, taken again: no fourth for ranks


@pytest.mark.ci
def test_two_groups_never_train(run_dir):
    """The leader is stopped and another node takes its lease: when the first one goes on, it leads no more."""
    nodes = Nodes(run_dir, 2, min_nodes=1, silence_seconds=3.0)
    first = nodes.wait(nodes.places(0, 1, size=2))
    nodes.stopped.add("node1")
    keeper = nodes.agents["node1"].leader.keeper
    keeper.ended.set()  # its process is stopped, and so are its threads
    second = nodes.wait(nodes.places(0, size=1, after=first))
    assert nodes.agents["node2"].leader is not None
    with pytest.raises(TrainingFailed):  # what a rank of the stopped node would meet before it saves
        refuse_if_superseded({LEASE: str(Lease(run_dir).file(first))})
    nodes.stopped.clear()
    nodes.wait(lambda: nodes.agents["node1"].leader is None and nodes.agents["node1"]._launch is None)
    assert Lease(run_dir).newest() == second
    assert finish(nodes)["status"] == "completed"


@pytest.mark.ci
def test_a_leader_that_only_its_file_system_reaches_lets_another_node_lead(run_dir, monkeypatch):
    """A partition leaves the leader alone, with a lease that it can renew: the nodes on the other side go on."""
    nodes = Nodes(run_dir, 3, expected=3, silence_seconds=3.0)
    first = nodes.wait(nodes.places(0, 1, size=2))
    alone = nodes.agents["node1"]
    for peer in alone.leader.peers:
        if peer.node != "node1":
            monkeypatch.setattr(peer.link, "receive", list)
            monkeypatch.setattr(nodes.agents[peer.node]._link, "receive", list)
    unreachable = alone.leader.keeper.record.port

    def connect(address: str, port: int, *further: Any) -> Any:
        if port == unreachable:
            raise OSError("no route to host")
        return wire.connect(address, port, *further)

    monkeypatch.setattr("dstune.launch.agents.agent.connect", connect)
    nodes.wait(lambda: alone.leader is None and alone._launch is None)
    assert "too few nodes can reach it" in nodes.log()
    nodes.stopped.add("node1")  # it reaches nobody
    second = nodes.wait(nodes.places(0, 1, size=2, after=first))
    assert nodes.leader == "node2"
    nodes.stopped.clear()
    nodes.wait(lambda: "node1" in nodes.agents["node2"].leader.group.members)  # as a spare
    assert nodes.places(0, 1, size=2)() == second
    assert finish(nodes)["status"] == "completed"


@pytest.mark.ci
def test_a_leader_whose_node_does_not_answer_is_followed_in_time(run_dir, monkeypatch):
    """Each attempt to connect to it lasts as long as a pause of the process that tries."""
    nodes = Nodes(run_dir, 2, min_nodes=1, silence_seconds=3.0)
    first = nodes.wait(nodes.places(0, 1, size=2))
    dead = nodes.agents["node1"].leader.keeper.record.port

    def connect(address: str, port: int, *further: Any) -> Any:
        if port == dead:
            time.sleep(PAUSE_SECONDS + 0.1)
            raise OSError("timed out")
        return wire.connect(address, port, *further)

    monkeypatch.setattr("dstune.launch.agents.agent.connect", connect)
    nodes.kill("node1")
    nodes.wait(nodes.places(0, size=1, after=first), seconds=25)
    assert nodes.leader == "node2"
    assert finish(nodes)["status"] == "completed"


@pytest.mark.ci
def test_a_leader_without_nodes_yields_once_and_then_waits(run_dir):
    nodes = Nodes(run_dir, 2, silence_seconds=3.0)
    first = nodes.wait(nodes.places(0, 1, size=2))
    nodes.kill("node2")
    nodes.wait(lambda: "too few nodes can reach it" in nodes.log())
    again = nodes.wait(lambda: nodes.agents["node1"].leader)
    waited = time.monotonic() - again.waiting_since
    assert waited > 5.0  # the clock of the give-up goes on
    until = time.monotonic() + 8.0
    nodes.wait(lambda: time.monotonic() > until)
    assert nodes.agents["node1"].leader is again
    nodes.agents["node2"] = nodes.agent(1)
    nodes.wait(nodes.places(0, 1, size=2, after=first))
    assert "node1, which led the run, was lost" not in nodes.log()
    assert finish(nodes)["status"] == "completed"


def test_a_message_of_one_of_many_nodes_is_read_alone(run_dir, monkeypatch):
    """Each of 512 agents wakes the leader once a second: with a look at all connections each time, the leader keeps a core busy."""
    nodes = Nodes(run_dir, 1, nodes=61, expected=61, min_nodes=61)
    leader = nodes.wait(lambda: nodes.agents["node1"].leader)
    nodes.stopped.add("node1")
    links = [wire.connect("127.0.0.1", leader.keeper.record.port, "secret", 3.0) for _ in range(60)]
    for number, link in enumerate(links):
        link.send({"hello": f"other{number}", "order": number + 1, "ranks": 1})
    now = time.monotonic()
    while len(leader.group.members) < 60:
        assert time.monotonic() < now + 30
        leader.tick(now)
        for link in links:
            link.receive()
    reads: list[wire.Link] = []
    receive = wire.Link.receive
    monkeypatch.setattr(wire.Link, "receive", lambda link: (reads.append(link), receive(link))[1])
    for link in links[:30]:
        link.send({"alive": True})
        leader.tick(now)
    assert len(reads) == 30
    leader.keeper.ended.set()
    leader.close()


def test_where_many_nodes_are_lost_at_once_another_leads_soon(run_dir):
    """The first 170 of 512 nodes, as of a partition that is preempted: the next node does not wait for the turns of all of them."""
    record = LeaseRecord("node 0", "node1", "127.0.0.1", 1, "-", "job")
    agents = [Agent(task_for(run_dir, order), f"keeper {order}") for order in (1, 3, 170, 511)]
    waits = []
    for agent in agents:
        at = agent._lease_changed_at
        waits.append(next(second for second in range(2000) if agent._may_lead(1, record, at + second)))
    assert waits == [17, 21, 23, 23]


def test_agents_lead_nothing_where_the_run_directory_is_gone(run_dir):
    """An empty folder in its place, as of a file system that is no longer mounted, has no lease to take."""
    (run_dir / "launch").rmdir()
    nodes = Nodes(run_dir, 1, nodes=1, expected=1, min_nodes=1)
    until = time.monotonic() + 1.5
    nodes.wait(lambda: time.monotonic() > until)
    assert nodes.agents["node1"].leader is None
    assert nodes.log().count("the lease of the run cannot be taken") == 1


@pytest.mark.ci
def test_a_pause_shorter_than_the_silence_starts_nothing_again(run_dir):
    nodes = Nodes(run_dir, 2, silence_seconds=3.0)
    first = nodes.wait(nodes.places(0, 1, size=2))
    for name in ("node2", "node1"):
        nodes.stopped.add(name)
        until = time.monotonic() + 2.0
        nodes.wait(lambda until=until: time.monotonic() > until)
        nodes.stopped.clear()
        until = time.monotonic() + 1.5
        nodes.wait(lambda until=until: time.monotonic() > until)
    assert nodes.places(0, 1, size=2)() == first
    assert Lease(run_dir).newest() == first
    assert finish(nodes)["status"] == "completed"


@pytest.mark.ci
def test_the_process_of_a_node_outlives_kills_and_leaves_with_its_connection(run_dir):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    settings = {"nodes": 1, "expected": 1, "min_nodes": 1}
    command = [sys.executable, "-u", "-m", "dstune.launch.agents"]

    def start() -> subprocess.Popen[bytes]:
        log = (run_dir / "agent.log").open("ab")
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=log, stderr=log, env=environment)
        process.stdin.write(f"{json.dumps(asdict(task_for(run_dir, 0, **settings)))}\n".encode())
        process.stdin.flush()
        return process

    nodes = Nodes(run_dir, 0)
    process = start()
    first = nodes.wait(nodes.places(0, size=1))
    [child] = [one for one in psutil.Process(process.pid).children() if "dstune.launch.agents" in one.cmdline()]
    server = fork_server_of(process)
    assert is_forked(nodes.place(0)[2])
    child.kill()
    second = nodes.wait(nodes.places(0, size=1, after=first))
    assert is_forked(nodes.place(0)[2])
    assert fork_server_of(process) == server  # the next agent did not import anything
    # Another connection to the node, while the network has not told this one that it is broken.
    other = start()
    third = nodes.wait(nodes.places(0, size=1, after=second))
    assert process.wait(10) == -signal.SIGKILL
    nodes.wait(lambda: not server.is_running())
    rank = nodes.place(0)[2]
    other.stdin.close()
    assert other.wait(30) == 0
    nodes.wait(lambda: fork_server_of(other) is None)
    assert not psutil.pid_exists(rank)
    assert Lease(run_dir).read(third).is_released
    process.stdin.close()
