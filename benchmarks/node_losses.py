"""What happens to a run on several nodes whose ranks, agents and nodes are killed, and whether its curve goes on.

    python benchmarks/node_losses.py                                      # all four campaigns, then the pauses: about 40 minutes
    python benchmarks/node_losses.py --launchers hostfile --modes spare   # one campaign
    python benchmarks/node_losses.py --kinds rank node                    # those kills alone
    python benchmarks/node_losses.py --only pauses

Three nodes are namespaces of this machine (tests/cluster/machines.py), with sshd and SLURM's real daemons. Two of them train a
tiny model in fp32. With `spare`, the third waits for the place of a lost one, and the curve has to be equal to the bit; with
`fewer`, one node goes on alone, and losses have to be equal within 1e-6; with `cut`, cables are pulled. Needs root; see
docs/evidence.md.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]

from cluster import machines as machines_module  # noqa: E402
from cluster import slurm as slurm_module  # noqa: E402
from cluster.conftest import Login, first_difference  # noqa: E402
from cluster.machines import Machines  # noqa: E402
from cluster.slurm import Slurm  # noqa: E402
from support.command import exact, metrics, overrides_of_run, result, wait_until  # noqa: E402
from support.tiny import save_decoder, write_dialogues  # noqa: E402

STEPS = 150
KINDS = [
    "rank",
    "agent",
    "save",
    "twice",
    "node",
    "leader",
    "leader node",
    "partition",
    "leader partition",
    "batch node",
    "batch node for good",
]
"""What is struck. `partition`: a cable is pulled, and put back after the others have gone on. `batch node`: the one that runs the
script of a SLURM job; `for good` where it stays dead until the run is over."""
LAST = "batch node for good"
MODES = {
    "spare": (["launch.spares=1"], ["node1", "node2", "node3"]),
    "fewer": (["launch.min_nodes=1"], ["node1", "node2"]),
    # Over before SLURM itself gives a node up (`SlurmdTimeout`: 300 s by default, 25 s here).
    "cut": (["launch.spares=1", "launch.silence_seconds=8"], ["node1", "node2", "node3"]),
}
NODES = ["node", "leader node", "batch node", LAST]
CUTS = ["partition", "leader partition"]
"""The kinds of the mode `cut`, and of no other."""
TOLERANCE = 1e-6


class Nodes:
    """The machines, and the processes on them."""

    def __init__(self, login: Login, machines: Machines, slurm: Slurm):
        self.login, self.machines, self.slurm = login, machines, slurm

    def processes(self, node: str) -> list[psutil.Process]:
        """Return all processes on a machine."""
        place = _host_names(self.machines.first_process(node))
        return [process for process in psutil.process_iter() if _host_names(process.pid) == place]

    def ranks(self, node: str) -> list[psutil.Process]:
        return [
            process
            for process in self.processes(node)
            if _runs(process, "dstune.worker") and _variable(process, "RANK")
        ]

    def agent(self, node: str) -> psutil.Process | None:
        """Return the process that starts ranks, not the one that keeps it."""
        agents = [process for process in self.processes(node) if _is_agent(process)]
        return next((process for process in agents if process.ppid() in {other.pid for other in agents}), None)

    def revive(self, node: str) -> None:
        self.machines.start(node)
        wait_until(lambda: self.machines.on("head", "ssh", node, "true").returncode == 0)
        self.slurm.start_node(node)

    def slurm_log(self) -> str:
        """Return the last lines of SLURM's controller."""
        return "\n".join((self.slurm.root / "log" / "slurmctld.log").read_text().splitlines()[-25:])

    def left_over(self) -> list[str]:
        """Return processes of dstune that are left on any node."""
        commands = (" ".join(_words(process)) for node in self.machines.names for process in self.processes(node))
        return [command for command in commands if "dstune" in command]


def _host_names(pid: int) -> str | None:
    try:
        return os.readlink(f"/proc/{pid}/ns/uts")
    except OSError:
        return None


def _words(process: psutil.Process) -> list[str]:
    try:
        return [] if process.status() == psutil.STATUS_ZOMBIE else process.cmdline()
    except psutil.Error:
        return []


def _variable(process: psutil.Process, name: str) -> str:
    try:
        return process.environ().get(name, "")
    except psutil.Error:
        return ""


def _runs(process: psutil.Process, module: str) -> bool:
    words = _words(process)
    return "python" in Path(words[0]).name and module in words if words else False


def _is_agent(process: psutil.Process) -> bool:
    return _runs(process, "dstune.launch.agents") and "srun" not in _words(process)


class Campaign:
    """One run, struck again and again."""

    def __init__(self, nodes: Nodes, launcher: str, mode: str):
        self.nodes, self.launcher, self.mode = nodes, launcher, mode
        self.run_dir = nodes.login.folder / f"{launcher}-{mode}"
        self.further, hosts = MODES[mode]
        (nodes.login.folder / f"hosts-{mode}").write_text("".join(f"{host} slots=1\n" for host in hosts))
        self.figures: list[dict[str, Any]] = []

    def words(self, *further: str) -> list[str]:
        launch = {
            "slurm": ["launch=slurm", "launch.nodes=2"],
            "hostfile": ["launch=hostfile", f"launch.hostfile=hosts-{self.mode}"],
        }[self.launcher]
        return ["train", *overrides(self.run_dir.name), *launch, *self.further, "launch.restarts=50", *further]

    def chosen(self, kinds: list[str]) -> list[str]:
        """Return those of `kinds` that this run can meet."""
        fitting = [kind for kind in kinds if (kind in CUTS) == (self.mode == "cut")]
        if self.launcher == "hostfile":
            return [kind for kind in fitting if not kind.startswith("batch node")]
        if self.mode == "fewer":  # SLURM takes a dead node out of the job for good: nothing can be struck after it
            lost = [kind for kind in fitting if kind in NODES][:1]
            return [kind for kind in fitting if kind not in NODES] + lost
        return fitting

    def play(self, kinds: list[str]) -> dict[str, Any]:
        began = time.monotonic()
        command = self.nodes.login.start(*self.words())
        try:
            for kind in kinds:
                self.until(lambda: self.past(), command)
                self.strike(kind, command)
            code = command.wait(timeout=600)
        except BaseException:
            print(self.nodes.login.log[-3000:], self.messages(), self.nodes.slurm_log(), sep="\n")
            for log in sorted((self.run_dir / "logs").glob("[as][gl]*.log")):
                print(log.name, log.read_text()[-2000:])
            command.kill()
            raise
        time.sleep(3.0)
        queue = self.nodes.slurm.call("squeue", "-h").splitlines()
        for node in self.nodes.machines.names:
            if not self.nodes.machines.is_up(node):
                self.nodes.revive(node)
        whole = self.nodes.login.folder / "undisturbed"
        rows, expected = exact(self.run_dir), exact(whole)
        losses = [(row["step"], row["loss"]) for row in rows if "loss" in row]
        measure = [(row["step"], row["loss"]) for row in expected if "loss" in row]
        same_steps = [step for step, _ in losses] == [step for step, _ in measure]
        apart = max(
            (abs(loss / measured_loss - 1) for (_, loss), (_, measured_loss) in zip(losses, measure, strict=False)),
            default=1.0,
        )
        return {
            "launcher": self.launcher,
            "mode": self.mode,
            "kills": len(self.figures),
            "exit": code,
            "status": result(self.run_dir)["status"],
            "same steps": same_steps,
            "largest relative difference of a loss": apart,
            "equal to the bit": first_difference(rows, expected) == "",
            "left over": self.nodes.left_over() + queue,
            "seconds": round(time.monotonic() - began),
        }

    def past(self, steps: int = 2) -> bool:
        """Return whether the run has trained on since the last strike."""
        done = self.figures[-1]["step"] if self.figures else 0
        return last_step(self.run_dir) >= done + steps

    def strike(self, kind: str, command: subprocess.Popen) -> None:
        status, starts = self.status(), self.starts()
        leader, training = status["leader"], status["training"]
        others = [node for node in training if node != leader] or training
        alone = {"partition": others[0], "leader partition": leader}.get(kind)
        if kind == "save":
            self.until(lambda: list((self.run_dir / "checkpoints").glob("*.incomplete")), command)
        struck, step = time.monotonic(), last_step(self.run_dir)
        dead = {"node": others[0], "leader node": leader}.get(kind)
        if kind.startswith("batch node"):
            dead = self.batch_node()
        revived = dead if kind != LAST else None
        if dead:
            self.nodes.machines.kill(dead)
        elif alone:
            self.nodes.machines.disconnect(alone)
        elif kind in ("agent", "leader"):
            agent = self.nodes.agent(leader if kind == "leader" else others[0])
            assert agent is not None
            agent.kill()
        else:
            self.nodes.ranks(training[0] if kind == "save" else others[0])[0].kill()
        self.until(
            lambda: self.starts() > starts and self.status()["training"],
            command,
            during=revived,
        )
        started = time.monotonic() - struck
        if alone:
            self.nodes.machines.reconnect(alone)
        if kind == "twice":
            time.sleep(2.0)
            starts = self.starts()
            agent = self.nodes.agent(self.status()["training"][0])
            assert agent is not None
            agent.kill()
            self.until(lambda: self.starts() > starts, command)
        nodes = self.status()["training"]
        if alone:
            self.until(lambda: {alone, *nodes} <= {*self.status()["training"], *self.status()["spare"]}, command)
        if revived and not self.nodes.machines.is_up(revived):
            self.nodes.revive(revived)
        # The node that came back has an agent again.
        if kind == "node" and (self.launcher, self.mode) != ("slurm", "fewer"):
            self.until(lambda: dead in {*self.status()["training"], *self.status()["spare"]}, command)
        self.until(lambda: last_step(self.run_dir) > step, command)
        figure = {"kind": kind, "step": step, "started": started, "trained": time.monotonic() - struck, "nodes": nodes}
        self.figures.append(figure)
        print(f"{self.launcher} {self.mode}: {figure}", flush=True)

    def batch_node(self) -> str:
        """Return the node that runs the script of the job."""
        shown = self.nodes.slurm.call("scontrol", "show", "job", self.job())
        return re.findall(r"BatchHost=(\S+)", shown)[0]

    def job(self) -> str:
        """Return the number of the run's job in SLURM's queue."""
        return self.nodes.slurm.call("squeue", "-h", "-o", "%A").split()[0]

    def status(self) -> dict[str, Any]:
        return json.loads((self.run_dir / "launch" / "agents.json").read_text())

    def messages(self) -> str:
        return (self.run_dir / "logs" / "launch.log").read_text()

    def starts(self) -> int:
        """Return how often all ranks were started."""
        return self.messages().count("dstune: starting ")

    def until(
        self, condition: Callable[[], Any], command: subprocess.Popen, seconds: float = 240, during: str | None = None
    ) -> None:
        began = time.monotonic()

        def reached() -> Any:
            try:
                value = condition()
            except (OSError, ValueError):
                value = False
            # A job needs all its nodes: one whose batch node died is requeued, and waits for this one to come back.
            if during and time.monotonic() - began > 25 and not self.nodes.machines.is_up(during):
                self.nodes.revive(during)
            return value or command.poll() is not None

        wait_until(reached, timeout=seconds)
        assert condition(), f"the command ended with {command.poll()}"


def pauses(nodes: Nodes, launcher: str) -> list[dict[str, Any]]:
    """Stop a node, then the leader's, for 10 s each, and let a step take a minute: nothing may start again. Returns the figures."""
    campaign = Campaign(nodes, launcher, "spare")
    campaign.run_dir = campaign.run_dir.with_name(f"{launcher}-pauses")
    command = nodes.login.start(*campaign.words("trainer.max_steps=80"))
    figures = []
    for paused, seconds in (("a node stopped", 10.0), ("the leader's node stopped", 10.0), ("a step", 60.0)):
        step = last_step(campaign.run_dir)
        campaign.until(lambda step=step: last_step(campaign.run_dir) >= step + 2, command)  # type: ignore[misc]
        status, starts = campaign.status(), campaign.starts()
        other = next(node for node in status["training"] if node != status["leader"])
        node = status["leader"] if "leader" in paused else other
        processes = nodes.ranks(node) if paused == "a step" else nodes.processes(node)
        for process in processes:
            process.send_signal(signal.SIGSTOP)
        time.sleep(seconds)
        for process in processes:
            process.send_signal(signal.SIGCONT)
        step = last_step(campaign.run_dir)
        campaign.until(lambda step=step: last_step(campaign.run_dir) > step + 1, command)  # type: ignore[misc]
        figures.append(
            {"launcher": launcher, "what": paused, "seconds": seconds, "restarts": campaign.starts() - starts}
        )
        print(figures[-1], flush=True)
    assert command.wait(timeout=300) == 0, nodes.login.log
    return figures


def last_step(run_dir: Path) -> int:
    rows = metrics(run_dir)
    return int(rows[-1]["step"]) if rows else 0


def overrides(name: str) -> list[str]:
    # In bf16 another order of sums moves a weight by a rounding step. Half a second a step: a node
    # that comes back needs 40 s, and finds the run still training.
    further = ["trainer.global_batch_size=192", "trainer.precision=fp32", "checkpoint.every=1", "checkpoint.keep=3"]
    return overrides_of_run(name, STEPS, *further)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--launchers", nargs="+", default=["hostfile", "slurm"], choices=["hostfile", "slurm"])
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=list(MODES))
    parser.add_argument("--kinds", nargs="+", default=KINDS, choices=KINDS)
    parser.add_argument("--only", choices=["kills", "pauses"])
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # and end the machines
    if reason := machines_module.missing() or slurm_module.missing():
        sys.exit(reason)
    with tempfile.TemporaryDirectory(prefix="losses-") as folder:
        root = Path(folder)
        (root / "work").mkdir()
        save_decoder(root / "work" / "model")
        write_dialogues(root / "work" / "dialogues.jsonl", 300)
        with Machines(root / "machines", count=3) as machines, Slurm(root / "slurm", machines) as slurm:
            login = Login(root / "work", machines)
            login.env |= slurm.env
            nodes = Nodes(login, machines, slurm)
            if arguments.only != "pauses":
                done = login.run("train", *overrides("undisturbed"), "launch.processes=2", timeout=900)
                assert done.returncode == 0, done.stdout + done.stderr
                for launcher in arguments.launchers:
                    for mode in arguments.modes:
                        campaign = Campaign(nodes, launcher, mode)
                        print(json.dumps(campaign.play(campaign.chosen(arguments.kinds))), flush=True)
            if arguments.only != "kills":
                for launcher in arguments.launchers:
                    pauses(nodes, launcher)


if __name__ == "__main__":
    main()
