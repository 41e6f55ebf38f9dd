"""Runs through real SLURM daemons on two nodes."""

from __future__ import annotations

import json
import re
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import yaml
from cluster.conftest import first_difference, overrides
from cluster.slurm import TWINS
from support.command import at_step, exact, ranks_of, result, wait_until

pytestmark = pytest.mark.cluster
TWO_NODES = ["launch=slurm", "launch.nodes=2"]


def job_of(run_dir: Path) -> str:
    return json.loads((run_dir / "launch.json").read_text())["jobs"][-1]


def test_a_job_is_asked_to_save_requeued_and_continues_exactly(on_slurm, slurm, undisturbed):
    """What SLURM sends before the time limit, by hand; streamed to the one who waits."""
    run_dir = on_slurm.folder / "requeued"
    command = on_slurm.start("train", *overrides("requeued", *TWO_NODES))
    wait_until(lambda: at_step(run_dir, 7))
    job = job_of(run_dir)
    slurm.call("scancel", "--signal=USR1", job)
    wait_until(lambda: "Restarts=1" in slurm.call("scontrol", "show", "job", job))
    assert command.wait(timeout=120) == 0, on_slurm.log
    assert first_difference(exact(run_dir), undisturbed) == ""
    assert result(run_dir)["world_size"] == 2
    environment = json.loads((run_dir / "environment.json").read_text())
    assert environment["hosts"] == ["node1", "node2"]
    [first, second] = environment["launches"]
    assert (first["step"], second["step"] >= 7) == (0, True)
    log = on_slurm.log
    assert f"submitted job {job}: 2 node(s) x 1 rank(s)" in log
    assert "steps 1 to 40" in log
    assert f"job {job} waits in the queue" in log
    assert f"steps {second['step'] + 1} to 40" in log
    assert {path.name for path in (run_dir / "logs").glob("rank-*.log")} == {"rank-0.log", "rank-1.log"}
    status = on_slurm.run("status", "requeued", "--json")
    assert json.loads(status.stdout)["state"] == "completed"
    assert (run_dir / "report.html").exists()


def test_a_killed_rank_starts_again_inside_its_job(on_slurm, slurm, undisturbed):
    run_dir = on_slurm.folder / "inside"
    command = on_slurm.start("train", *overrides("inside", *TWO_NODES, "launch.restarts=3"))
    wait_until(lambda: at_step(run_dir, 7))
    victim = next(process for process in ranks_of(run_dir) if process.environ().get("RANK") == "1")
    victim.kill()
    assert command.wait(timeout=180) == 0, on_slurm.log
    assert "rank 1 on node2 was killed by SIGKILL" in on_slurm.log
    assert "Restarts=0" in slurm.call("scontrol", "show", "job", job_of(run_dir))
    assert first_difference(exact(run_dir), undisturbed) == ""


def test_two_nodes_on_one_host(on_slurm, undisturbed):
    """Each agent sees the processes of the other node, and of the `srun` that started it."""
    done = on_slurm.run("train", *overrides("one-host", *TWO_NODES, "launch.partition=twins"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert {record["node"] for record in keepers(on_slurm.folder / "one-host")} == set(TWINS)
    assert first_difference(exact(on_slurm.folder / "one-host"), undisturbed) == ""


@pytest.mark.parametrize("partition", ["debug", "twins"])
@pytest.mark.timeout(600)
def test_killed_agents_start_again_inside_their_job(on_slurm, slurm, undisturbed, partition):
    """The agent of a node, the leader, and then a whole job step: its keeper with all that descends from it."""
    name = f"agents-{partition}"
    run_dir = on_slurm.folder / name
    further = [*TWO_NODES, f"launch.partition={partition}", "launch.restarts=9"]
    command = on_slurm.start("train", *overrides(name, *further))
    for number, victim in enumerate(("agent", "leader", "keeper")):
        # The ranks that were started again have trained on, so all of this happens within one run.
        wait_until(lambda number=number: starts(run_dir) == number + 1 and at_step(run_dir, 6 * (number + 1)))
        status = json.loads((run_dir / "launch" / "agents.json").read_text())
        leader = status["leader"]
        node = leader if victim == "leader" else next(node for node in status["training"] if node != leader)
        keeper, agent = agent_of(run_dir, node)
        for process in [agent] if victim != "keeper" else [keeper, *keeper.children(recursive=True)]:
            with suppress(psutil.NoSuchProcess):  # an agent dies with its keeper
                process.kill()
    assert command.wait(timeout=240) == 0, on_slurm.log
    assert "Restarts=0" in slurm.call("scontrol", "show", "job", job_of(run_dir))
    assert first_difference(exact(run_dir), undisturbed) == ""
    assert not ranks_of(run_dir)


def starts(run_dir: Path) -> int:
    """Return how often all ranks were started."""
    log = run_dir / "logs" / "launch.log"
    return log.read_text().count("dstune: starting ") if log.exists() else 0


def keepers(run_dir: Path) -> list[dict]:
    return [json.loads(file.read_text()) for file in (run_dir / "launch").glob("keeper-*.json")]


def agent_of(run_dir: Path, node: str) -> tuple[psutil.Process, psutil.Process]:
    """Return the keeper of a node's agent, and the agent."""
    processes = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            words = process.cmdline()
            is_agent = "dstune.launch.agents" in words and str(run_dir) in words and Path(words[0]).name != "srun"
            if is_agent and process.environ().get("SLURMD_NODENAME") == node:
                processes.append(process)
    [agent] = [process for process in processes if process.parent() in processes]
    return agent.parent(), agent


def test_a_killed_rank_without_restarts_is_named(on_slurm, slurm, undisturbed):
    """The job and the command end, and say which rank on which node, and why; the same command then continues."""
    run_dir = on_slurm.folder / "named-rank"
    command = on_slurm.start("train", *overrides("named-rank", *TWO_NODES))
    wait_until(lambda: at_step(run_dir, 7))
    next(process for process in ranks_of(run_dir) if process.environ().get("RANK") == "1").kill()
    assert command.wait(timeout=120) == 1
    assert "rank 1 on node2 was killed by SIGKILL" in result(run_dir)["reason"]
    assert result(run_dir)["reason"] in on_slurm.log
    wait_until(lambda: not slurm.call("squeue", "-h").strip())
    again = on_slurm.run("train", "named-rank")
    assert again.returncode == 0, again.stdout + again.stderr
    assert first_difference(exact(run_dir), undisturbed) == ""


def test_a_mistake_and_a_refusal_of_sbatch_leave_nothing(on_slurm):
    done = on_slurm.run("train", *overrides("refused", *TWO_NODES, "launch.partition=none", "launch.time=30"))
    assert done.returncode == 2
    assert "invalid partition specified: none" in done.stderr
    assert not (on_slurm.folder / "refused").exists()


@pytest.mark.slow
def test_left_alone_looked_at_and_cancelled(on_slurm, slurm, undisturbed):
    """`launch.wait=false`, `status` and `cancel`; the same command then continues, by its script and by hand."""
    run_dir = on_slurm.folder / "left"
    done = on_slurm.run("train", *overrides("left", *TWO_NODES, "launch.wait=false"))
    assert done.returncode == 0, done.stderr
    assert "dstune status" in done.stderr
    wait_until(lambda: at_step(run_dir, 5))
    # Looking takes longer than the rest of so small a run on a busy machine: its ranks wait meanwhile.
    slurm.call("scancel", "--signal=STOP", job_of(run_dir))
    status = json.loads(on_slurm.run("status", "left", "--json").stdout)
    assert (status["state"], status["jobs"]) == ("running", [job_of(run_dir)])
    again = on_slurm.run("train", "left")
    assert again.returncode == 2
    assert f"job {job_of(run_dir)} is" in again.stderr
    cancel = on_slurm.start("cancel", "left")
    wait_until(lambda: (run_dir / "STOP").exists())
    slurm.call("scancel", "--signal=CONT", job_of(run_dir))
    assert cancel.wait(timeout=120) == 0
    assert "preempted (a file named STOP asked for it)" in on_slurm.log
    assert 5 <= result(run_dir)["steps"] < 40
    assert slurm.call("squeue", "-h").strip() == ""
    # By hand, as its first lines say.
    by_hand = on_slurm.call("sbatch", "--parsable", str(run_dir / "launch" / "job.sbatch"))
    assert by_hand.returncode == 0, by_hand.stderr
    wait_until(lambda: (run_dir / "result.json").exists() and result(run_dir)["status"] == "completed")
    assert job_of(run_dir) == by_hand.stdout.strip()
    assert first_difference(exact(run_dir), undisturbed) == ""
    # What waits in the queue leaves it.
    late = ["launch.wait=false", "launch.directives=['--begin=now+1hour']"]
    assert on_slurm.run("train", *overrides("late", *TWO_NODES, *late)).returncode == 0
    assert "pending" in on_slurm.run("status", "late").stdout
    assert on_slurm.run("cancel", "late").returncode == 0
    assert slurm.call("squeue", "-h").strip() == ""


LONG = ["trainer.global_batch_size=192", "trainer.max_steps=60", "checkpoint.every=0", "evaluate.every=0"]


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_time_limit_comes_again_and_again(on_slurm, slurm):
    """Jobs of a minute, told to save by SLURM itself; no step is lost or done twice."""
    whole = on_slurm.run("train", *overrides("whole", *LONG, "launch.processes=2"), timeout=600)
    assert whole.returncode == 0, whole.stdout + whole.stderr
    limits = [*TWO_NODES, "launch.time=1", "launch.signal_seconds=20"]
    command = on_slurm.start("train", *overrides("limited", *LONG, *limits))
    run_dir = on_slurm.folder / "limited"
    assert command.wait(timeout=900) == 0, on_slurm.log
    launches = json.loads((run_dir / "environment.json").read_text())["launches"]
    print("launches", launches)
    assert len(launches) >= 3
    assert first_difference(exact(run_dir), exact(on_slurm.folder / "whole")) == ""


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_node_that_loses_power_and_comes_back(on_slurm, slurm, machines, undisturbed):
    """Its job is requeued by SLURM and continues from the newest whole checkpoint."""
    run_dir = on_slurm.folder / "power"
    command = on_slurm.start("train", *overrides("power", *TWO_NODES))
    wait_until(lambda: at_step(run_dir, 8))
    machines.kill("node2")
    job = job_of(run_dir)
    wait_until(lambda: "Restarts=1" in slurm.call("scontrol", "show", "job", job))
    machines.start("node2")
    slurm.start_node("node2")
    assert command.wait(timeout=240) == 0, on_slurm.log
    assert first_difference(exact(run_dir), undisturbed) == ""
    launches = json.loads((run_dir / "environment.json").read_text())["launches"]
    assert launches[-1]["step"] in (5, 10, 15, 20, 25, 30, 35)


@pytest.mark.slow
def test_a_chain_of_jobs_where_requeueing_is_forbidden(on_slurm, slurm, undisturbed):
    run_dir = on_slurm.folder / "chain"
    chain = [*TWO_NODES, "launch.requeue=false", "launch.chain=3"]
    command = on_slurm.start("train", *overrides("chain", *chain))
    wait_until(lambda: at_step(run_dir, 7))
    first = json.loads((run_dir / "launch.json").read_text())["jobs"][0]
    assert "Requeue=0" in slurm.call("scontrol", "show", "job", first)
    slurm.call("scancel", "--signal=USR1", first)
    assert command.wait(timeout=240) == 0, on_slurm.log
    assert first_difference(exact(run_dir), undisturbed) == ""
    jobs = json.loads((run_dir / "launch.json").read_text())["jobs"]
    assert len(jobs) == 3
    assert "completed: nothing is left to do" in (run_dir / "logs" / f"slurm-{jobs[2]}.log").read_text()


@pytest.mark.slow
def test_a_rank_that_finds_the_users_mistake(on_slurm):
    """Known to the ranks alone: it ends the job and the command with 2, and nothing is left."""
    rows = (on_slurm.folder / "dialogues.jsonl").read_text().splitlines()
    (on_slurm.folder / "broken.jsonl").write_text("\n".join([*rows[:250], '{"messages": 7}', *rows[250:]]))
    done = on_slurm.run("train", *overrides("mistake", *TWO_NODES, "data.train=broken.jsonl"))
    assert done.returncode == 2, done.stdout + done.stderr
    assert "broken.jsonl:251" in done.stderr
    assert "submitted job" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (on_slurm.folder / "mistake").exists()


@pytest.mark.slow
def test_doctor_measures_between_nodes_of_a_job(on_slurm):
    done = on_slurm.run("doctor", *TWO_NODES, "--json")
    found = {check["name"]: check for check in json.loads(done.stdout)["checks"]}
    print(found["slurm"], found["all-reduce"])
    assert found["slurm"]["status"] == "pass"
    assert "debug" in found["slurm"]["detail"]
    assert found["all-reduce"]["status"] == "pass", done.stderr
    assert "2 ranks on 2 hosts: bus bandwidth" in found["all-reduce"]["detail"]


@pytest.mark.slow
def test_a_sweep_with_jobs_in_flight(on_slurm):
    """Two trials at a time, each a job of its own; a second start has nothing to do."""
    words = [
        "train",
        "-m",
        *overrides("", "launch=slurm", "sweep.parallel=2", "sweep.dir=flight", "trainer.max_steps=6"),
    ]
    words = [word for word in words if word != "run.dir="]
    words = ["optimizer.lr=1e-3,2e-3,4e-3" if word.startswith("optimizer.lr") else word for word in words]
    done = on_slurm.run(*words, "--json", timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    trials = json.loads(done.stdout)["trials"]
    assert {trial["status"] for trial in trials} == {"completed"}
    jobs = [job_of(on_slurm.folder / trial["run"]) for trial in trials]
    assert len(set(jobs)) == 3
    again = on_slurm.run("train", "flight", "--json")
    assert {trial["starts"] for trial in json.loads(again.stdout)["trials"]} == {1}


@pytest.mark.slow
def test_a_sweep_as_an_array(on_slurm, slurm):
    """Submitted and left alone: seen, killed in the middle, submitted again, and equal to a run by itself."""
    common = overrides("alone", "launch=slurm", "trainer.max_steps=12")
    alone = on_slurm.run("train", *common, "optimizer.lr=2e-3")
    assert alone.returncode == 0, alone.stderr
    words = [word for word in common if not word.startswith(("run.dir", "optimizer.lr"))]
    words = ["train", "-m", *words, "optimizer.lr=1e-3,2e-3,4e-3", "launch.wait=false", "sweep.parallel=2"]
    words.append("sweep.dir=array")
    sweep = on_slurm.folder / "array"
    done = on_slurm.run(*words)
    assert done.returncode == 0, done.stdout + done.stderr
    first = job_of(sweep / "lr=0.001").split("_")[0]
    states = json.loads(on_slurm.run("runs", "array", "--json").stdout)["runs"]
    assert len(states) == 3
    assert {line["status"] for line in states} <= {"pending", "running", "completed"}
    refused = on_slurm.run("train", "array/lr=0.004")
    assert refused.returncode == 2
    assert "job" in refused.stderr
    wait_until(lambda: at_step(sweep / "lr=0.001", 2))
    slurm.call("scancel", f"{first}_0")
    wait_until(lambda: not slurm.call("squeue", "--noheader", "--jobs", first).strip(), timeout=200)
    again = on_slurm.run(*words)
    assert again.returncode == 0, again.stdout + again.stderr
    wait_until(lambda: (sweep / "lr=0.001" / "result.json").exists(), timeout=200)
    wait_until(lambda: result(sweep / "lr=0.001").get("status") == "completed", timeout=60)
    # The job writes its report after the result, and runs until then.
    wait_until(lambda: not slurm.call("squeue", "--noheader").strip(), timeout=60)
    found = json.loads(on_slurm.run("runs", "array", "--json").stdout)["runs"]
    assert [line["status"] for line in found] == ["completed"] * 3
    assert first_difference(exact(sweep / "lr=0.002"), exact(on_slurm.folder / "alone")) == ""
    assert on_slurm.run("report", "array").returncode == 0
    assert "3 completed" in (sweep / "report.html").read_text()


@pytest.mark.ci
def test_the_first_node_chooses_the_zero_stage(on_slurm):
    """The machine that submits knows no hardware: the job chooses as the plan does on a node, and trains as with that stage."""
    short = ["trainer.max_steps=6", "evaluate.every=0", "checkpoint.every=0"]
    done = on_slurm.run("train", *overrides("open", *TWO_NODES, *short, "zero.stage=auto"))
    assert done.returncode == 0, done.stderr
    stored = yaml.safe_load((on_slurm.folder / "open" / "run.yaml").read_text())
    assert stored["config"]["zero"]["stage"] == "auto"
    [chosen] = re.findall(r"zero\.stage=(\d): .* GiB a rank", done.stdout + done.stderr)
    given = on_slurm.run("train", *overrides("given", *TWO_NODES, *short, f"zero.stage={chosen}"))
    assert given.returncode == 0, given.stderr
    assert first_difference(exact(on_slurm.folder / "open"), exact(on_slurm.folder / "given")) == ""
    named = on_slurm.run("train", *overrides("named", *TWO_NODES, *short, "zero.stage=auto", "launch.hardware=8xH100"))
    assert named.returncode == 0, named.stderr
    stored = yaml.safe_load((on_slurm.folder / "named" / "run.yaml").read_text())
    assert isinstance(stored["config"]["zero"]["stage"], int)
