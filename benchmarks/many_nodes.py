"""What the leader of a run on many nodes costs: real agents on this machine, a process group for each node, with ranks that wait
instead of training.

    python -m benchmarks.many_nodes [--nodes 8,64] [--ranks 1] [--json FILE]

For each number of nodes: a start, a time of training, a leader that is killed, and a third of the nodes that are killed at once,
the leader among them. The columns are sums or rates of the process that leads: processor seconds, memory of its own, messages, and
how often it read a connection. Times by the clock say little: the agents share the cores of one machine. Two cores do not carry the
agents and ranks of 512 nodes: they did not all start within nine minutes.
"""

from __future__ import annotations

import argparse
import gc
import json
import mmap
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
STEADY_SECONDS = 20.0
COUNTERS = ("received", "sent", "looks", "ticks")


def wait_as_a_rank(run_dir: Path) -> int:
    """Wait as a rank that trains: leave a file with the generation, write a line a second to the log, and end when asked."""
    from dstune.core.rank_env import die_with_parent

    die_with_parent()
    rank, generation = int(os.environ["RANK"]), Path(os.environ["DSTUNE_LEASE"]).name
    (run_dir / "ranks" / f"{generation}-{rank}").touch()
    while not (run_dir / "finish").exists():
        print(f"step of rank {rank}", flush=True)
        time.sleep(1.0)
    if rank == 0:
        (run_dir / "result.json").write_text(json.dumps({"status": "completed", "steps": 3}))
    return 0


class Counts:
    """Numbers of each node that all processes share."""

    def __init__(self, nodes: int):
        self._memory = mmap.mmap(-1, 8 * len(COUNTERS) * nodes)
        self._values = memoryview(self._memory).cast("q")

    def add(self, node: int, counter: str, count: int = 1) -> None:
        self._values[node * len(COUNTERS) + COUNTERS.index(counter)] += count

    def of(self, node: int) -> dict[str, int]:
        first = node * len(COUNTERS)
        return dict(zip(COUNTERS, self._values[first : first + len(COUNTERS)], strict=True))


def count_in_leaders(counts: Counts, node: int) -> None:
    """Count in this process what its leader, if it becomes one, does."""
    from dstune.launch.agents import leader, wire

    receive, send, tick = wire.Link.receive, wire.Link.send, leader.Leader.tick

    def counted_receive(link: wire.Link) -> list[wire.Message]:
        messages = receive(link)
        if link._role == wire.LEADER:
            counts.add(node, "looks")
            counts.add(node, "received", len(messages))
        return messages

    def counted_send(link: wire.Link, message: wire.Message) -> None:
        if link._role == wire.LEADER:
            counts.add(node, "sent")
        send(link, message)

    def counted_tick(self: leader.Leader, *arguments: Any) -> None:
        counts.add(node, "ticks")
        tick(self, *arguments)

    for owner, name, counted in (
        (wire.Link, "receive", counted_receive),
        (wire.Link, "send", counted_send),
        (leader.Leader, "tick", counted_tick),
    ):
        setattr(owner, name, counted)


@dataclass
class Sample:
    """What a leader has used and done until now."""

    node: int
    seconds: float
    mib: float
    counts: dict[str, int]

    def since(self, earlier: Sample | None) -> dict[str, float]:
        same = earlier is not None and earlier.node == self.node
        before = earlier.counts if earlier is not None and same else dict.fromkeys(COUNTERS, 0)
        used = self.seconds - (earlier.seconds if earlier is not None and same else 0.0)
        return {"cpu_s": used, "mib": self.mib, **{name: self.counts[name] - before[name] for name in COUNTERS}}


class Cluster:
    """Agents of `nodes` nodes on this machine, each kept running by a process of its own."""

    def __init__(self, folder: Path, nodes: int, ranks: int):
        self.run_dir, self.nodes, self.ranks = folder, nodes, ranks
        for name in ("logs", "launch", "ranks"):
            (folder / name).mkdir()
        self.counts = Counts(nodes)
        self.keepers: dict[int, int] = {}

    def start(self) -> None:
        from dstune.launch.agents.__main__ import keep
        from dstune.launch.agents.task import Settings, Task

        settings = Settings(
            nodes=self.nodes, expected=self.nodes, min_nodes=1, restarts=9, silence_seconds=15.0, grace_seconds=5.0,
            interface="lo", warm=False,
        )  # fmt: skip
        gc.freeze()
        for node in range(self.nodes):
            task = Task(
                run_dir=str(self.run_dir), command=["benchmarks.many_nodes", "--rank", str(self.run_dir)],
                settings=settings, node=f"node{node}", order=node, ranks=self.ranks, launch="job", secret="secret",
                variables={"PYTHONPATH": str(ROOT)},
            )  # fmt: skip
            if pid := os.fork():
                self.keepers[node] = pid
                continue
            os.setsid()
            log = os.open(self.run_dir / "logs" / f"agent-{node}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            os.dup2(log, 1)
            os.dup2(log, 2)
            count_in_leaders(self.counts, node)
            os._exit(keep(task))

    def agent(self, node: int) -> Any:
        import psutil

        (agent,) = psutil.Process(self.keepers[node]).children()
        return agent

    def kill(self, *nodes: int) -> None:
        """End all processes of `nodes`, as where their machines lose power."""
        import psutil

        processes = []
        for node in nodes:
            keeper = psutil.Process(self.keepers.pop(node))
            processes += [keeper, *keeper.children(recursive=True)]
        for process in processes:
            process.suspend()
        for process in processes:
            process.kill()

    def status(self) -> dict[str, Any]:
        from dstune.launch.agents.status import GROUP_FILE

        try:
            return json.loads((self.run_dir / GROUP_FILE).read_text())
        except (OSError, ValueError):
            return {}

    def sample(self, node: int) -> Sample:
        agent = self.agent(node)
        times = agent.cpu_times()
        return Sample(node, times.user + times.system, agent.memory_full_info().uss / 2**20, self.counts.of(node))

    def wait_for_ranks(self, nodes: int, after: int) -> dict[str, Any]:
        """Return the state in which all ranks of `nodes` nodes of a generation after `after` run."""

        def trains() -> dict[str, Any] | None:
            status = self.status()
            if status.get("generation", 0) <= after or len(status.get("training", ())) != nodes:
                return None
            started = list((self.run_dir / "ranks").glob(f"{status['generation']:08d}-*"))
            return status if len(started) == nodes * self.ranks else None

        return self.wait(trains)

    def wait(self, condition: Callable[[], Any], seconds: float = 900.0) -> Any:
        deadline = time.monotonic() + seconds
        while not (reached := condition()):
            if time.monotonic() > deadline:
                raise TimeoutError((self.run_dir / "logs" / "launch.log").read_text()[-2000:])
            time.sleep(0.2)
        return reached

    def finish(self) -> int:
        """End the run, and return how many agents ended well."""
        (self.run_dir / "finish").touch()
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in self.keepers.values()]
        self.keepers.clear()
        return codes.count(0)


def leader_of(status: dict[str, Any]) -> int:
    return int(status["leader"].removeprefix("node"))


def measure(nodes: int, ranks: int, say: Callable[[str], None]) -> list[dict[str, Any]]:
    folder = Path(tempfile.mkdtemp(prefix="many-nodes-"))
    cluster, rows = Cluster(folder, nodes, ranks), []

    def note(what: str, values: dict[str, float]) -> None:
        rows.append({"nodes": nodes, "what": what, **{name: round(value, 3) for name, value in values.items()}})
        say(str(rows[-1]))

    try:
        began = time.monotonic()
        cluster.start()
        status = cluster.wait_for_ranks(nodes, 0)
        first = cluster.sample(leader_of(status))
        note("start", {**first.since(None), "clock_s": time.monotonic() - began})
        time.sleep(STEADY_SECONDS)
        steady = cluster.sample(first.node).since(first)
        per_second = {name: value if name == "mib" else value / STEADY_SECONDS for name, value in steady.items()}
        note("a second of training", per_second)
        began = time.monotonic()
        cluster.kill(first.node)
        status = cluster.wait_for_ranks(nodes - 1, status["generation"])
        second = cluster.sample(leader_of(status))
        note("a lost leader", {**second.since(None), "clock_s": time.monotonic() - began})
        lost = list(range(first.node + 1, first.node + 1 + nodes // 3))
        began = time.monotonic()
        cluster.kill(*{*lost, second.node})
        status = cluster.wait_for_ranks(nodes - 1 - len({*lost, second.node}), status["generation"])
        third = cluster.sample(leader_of(status))
        note("a third of the nodes lost", {**third.since(None), "clock_s": time.monotonic() - began})
        began = time.monotonic()
        left = len(cluster.keepers)
        well = cluster.finish()
        note("the end", {"agents": left, "ended_well": well, "clock_s": time.monotonic() - began})
    finally:
        for pid in cluster.keepers.values():
            os.killpg(pid, signal.SIGKILL)
        shutil.rmtree(folder, ignore_errors=True)
    return rows


def main(argv: list[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else argv
    if words[:1] == ["--rank"]:
        return wait_as_a_rank(Path(words[1]))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", default="8,64", help="numbers of nodes [%(default)s]")
    parser.add_argument("--ranks", type=int, default=1, help="ranks of a node [%(default)s]")
    parser.add_argument("--json", type=Path, help="file for the rows")
    arguments = parser.parse_args(words)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # ends the agents too
    rows = [
        row
        for nodes in map(int, arguments.nodes.split(","))
        for row in measure(nodes, arguments.ranks, lambda line: print(line, flush=True))
    ]
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
