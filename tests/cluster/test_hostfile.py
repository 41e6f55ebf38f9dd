"""Runs on several hosts over ssh: by agents, and by Open MPI's mpirun."""

from __future__ import annotations

import json
import shutil
import signal
import sys
import time
from pathlib import Path

import psutil
import pytest
from cluster.conftest import Login, first_difference, overrides
from cluster.machines import Machines
from support.command import at_step, exact, result, wait_until

pytestmark = pytest.mark.cluster


def needs(program: str, package: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(
        shutil.which(program) is None, reason=f"not installed (Debian: apt-get install {package})"
    )


@pytest.fixture(scope="module")
def hosts(login) -> str:
    (login.folder / "hosts").write_text("node1 slots=1\nnode2 slots=1\n")
    return "launch.hostfile=hosts"


def processes_of(run_dir: Path) -> list[psutil.Process]:
    """Whatever names the run directory, on any of the machines."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        words = process.info["cmdline"] or []
        if any(str(run_dir) in word for word in words) and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(process)
    return found


def ranks_of(run_dir: Path) -> dict[str, psutil.Process]:
    """The ranks of a run, on any of the machines, by their numbers."""
    ranks = [process for process in processes_of(run_dir) if "dstune.worker" in process.cmdline()]
    return {process.environ()["RANK"]: process for process in ranks if "RANK" in process.environ()}


def signal_command(run_dir: Path, number: int) -> None:
    """To `dstune train` itself, which runs on the head."""
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if words[1:4] == ["-m", "dstune", "train"] and f"run.dir={run_dir.name}" in words:
            process.send_signal(number)


def test_two_hosts_equal_one_and_a_signal_saves(login, hosts, undisturbed):
    """Over ssh: stopped by a signal through the run directory, continued, the same curve as on one machine."""
    run_dir = login.folder / "ssh"
    launch = ["launch=hostfile", hosts, "launch.interface=eth0"]
    secret = {"WANDB_API_KEY": "never-on-a-command-line", "MINE_TOKEN": "nor-this-one"}
    login.env |= secret
    command = login.start("train", *overrides("ssh", *launch, "launch.export_env=[MINE_TOKEN]"))
    wait_until(lambda: at_step(run_dir, 6))
    command_words = [word for process in psutil.process_iter(["cmdline"]) for word in process.info["cmdline"] or []]
    assert not [word for word in command_words if any(value in word for value in secret.values())]
    assert {"0", "1"} == ranks_of(run_dir).keys()
    signal_command(run_dir, signal.SIGTERM)
    assert command.wait(timeout=90) == 75, login.log
    assert not processes_of(run_dir)
    assert not [path for path in run_dir.rglob("*") if path.is_file() and b"nor-this-one" in path.read_bytes()]
    again = login.run("train", *overrides("ssh", *launch))
    assert again.returncode == 0, again.stdout + again.stderr
    assert first_difference(exact(run_dir), undisturbed) == ""
    assert "steps 1 to 40" in login.log
    for rank in (0, 1):
        assert f"=== rank {rank} of 2 on node{rank + 1}," in (run_dir / "logs" / f"rank-{rank}.log").read_text()
    for name in secret:
        del login.env[name]


@needs("mpirun", "openmpi-bin")
def test_two_hosts_through_mpirun(login, hosts, undisturbed):
    pytest.importorskip("mpi4py", reason="not installed (pip install '.[mpi]' in a clone of dstune)")
    done = login.run("train", *overrides("mpi", "launch=openmpi", hosts, "launch.interface=eth0"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert first_difference(exact(login.folder / "mpi"), undisturbed) == ""
    assert result(login.folder / "mpi")["world_size"] == 2


@pytest.mark.slow
@needs("mpirun", "openmpi-bin")
def test_mpirun_starts_again_after_a_rank_is_killed(login, hosts, undisturbed):
    pytest.importorskip("mpi4py", reason="not installed (pip install '.[mpi]' in a clone of dstune)")
    run_dir = login.folder / "mpi-again"
    launch = ["launch=openmpi", hosts, "launch.interface=eth0", "launch.restarts=2"]
    command = login.start("train", *overrides(run_dir.name, *launch))
    for count, step in enumerate((6, 20), start=1):
        wait_until(lambda step=step: at_step(run_dir, step))
        openmpi_ranks(run_dir)["1"].kill()
        wait_until(lambda count=count: f"({count} of 2 restarts)" in login.log)
    assert command.wait(timeout=300) == 0, login.log
    assert "(2 of 2 restarts)" in login.log
    assert not processes_of(run_dir)
    assert first_difference(exact(run_dir), undisturbed) == ""


def openmpi_ranks(run_dir: Path) -> dict[str, psutil.Process]:
    ranks = [process for process in processes_of(run_dir) if "dstune.worker" in process.cmdline()]
    environments = [(process, process.environ()) for process in ranks]
    return {
        found["OMPI_COMM_WORLD_RANK"]: process for process, found in environments if "OMPI_COMM_WORLD_RANK" in found
    }


@needs("pdsh", "pdsh")
def test_what_is_wrong_with_hosts_is_named_before_anything_starts(login, hosts, machines: Machines, tmp_path):
    """A dead host, an unknown one, another dstune, a folder that is not shared: all at once; and a refused key."""
    (login.folder / "broken").write_text("node1 slots=1\nnode9 slots=1\nnode2 slots=1\n10.77.0.77 slots=1\n")
    # node2 has another dstune and other files: a mount of its own over the package's folder.
    package = Path(__file__).parents[2] / "dstune"
    copy = shutil.copytree(package, tmp_path / "dstune", ignore=shutil.ignore_patterns("__pycache__"))
    (copy / "cli.py").write_text("# older\n")
    assert machines.on("node2", "mount", "--bind", str(copy), str(package)).returncode == 0
    assert machines.on("node2", "mount", "-t", "tmpfs", "none", str(login.folder)).returncode == 0
    try:
        done = login.run("train", *overrides("wrong", "launch=hostfile", "launch.hostfile=broken"))
    finally:
        machines.on("node2", "umount", str(package))
        machines.on("node2", "umount", str(login.folder))
    assert done.returncode == 2
    assert "launch.hostfile=node9: no machine has this name" in done.stderr
    assert "launch.hostfile=10.77.0.77: it does not answer" in done.stderr
    assert f"launch.hostfile=node2: {package} differs from the one on this machine" in done.stderr
    assert "run.dir=node2:" in done.stderr
    assert "node1" not in done.stderr.split("problems", 1)[1]
    assert not (login.folder / "wrong").exists()
    refused = login.run("train", *overrides("wrong", "launch=hostfile", hosts, "launch.user=nobody"))
    assert refused.returncode == 2
    assert refused.stderr.count("it refuses the key") == 2


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["hostfile", "openmpi"])
def test_doctor_measures_between_hosts(login, hosts, launcher):
    done = login.run("doctor", f"launch={launcher}", hosts, "--json")
    found = {check["name"]: check for check in json.loads(done.stdout)["checks"]}
    assert [found[name]["status"] for name in ("host node1", "host node2", launcher)] == ["pass"] * 3
    print(found["all-reduce"])
    assert found["all-reduce"]["status"] == "pass", done.stderr
    assert "2 ranks on 2 hosts: bus bandwidth" in found["all-reduce"]["detail"]
    assert not list(login.folder.glob(".dstune-doctor-*"))


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["hostfile", "openmpi"])
def test_a_host_lost_in_the_middle(login, hosts, machines, undisturbed, launcher):
    """The run ends by itself, nothing is left on the other host, and the next start continues."""
    run_dir = login.folder / f"lost-{launcher}"
    command = login.start("train", *overrides(run_dir.name, f"launch={launcher}", hosts))
    wait_until(lambda: at_step(run_dir, 8))
    machines.kill("node2")
    lost = time.monotonic()
    try:
        assert command.wait(timeout=90) == 1
        took = time.monotonic() - lost
        print(f"{launcher}: ended {took:.0f} s after the host was lost")
        assert took < 45
        assert not processes_of(run_dir)
        assert result(run_dir)["status"] == "failed"
        if launcher == "hostfile":
            assert "node2 was lost" in login.log
    finally:
        machines.start("node2")
    wait_until(lambda: machines.on("head", "ssh", "node2", "true").returncode == 0)
    again = login.run("train", *overrides(run_dir.name, f"launch={launcher}", hosts))
    assert again.returncode == 0, again.stdout + again.stderr
    assert first_difference(exact(run_dir), undisturbed) == ""


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["rank", "command"])
def test_a_killed_rank_or_command_leaves_nothing_on_any_host(login, hosts, undisturbed, victim):
    run_dir = login.folder / f"killed-{victim}"
    command = login.start("train", *overrides(run_dir.name, "launch=hostfile", hosts))
    wait_until(lambda: at_step(run_dir, 6))
    if victim == "rank":
        ranks_of(run_dir)["1"].kill()
        assert command.wait(timeout=60) == 1
        assert "rank 1 on node2 was killed by SIGKILL" in login.log
        assert result(run_dir)["failure"]["node"] == "node2"
    else:
        signal_command(run_dir, signal.SIGKILL)
        command.wait(timeout=20)
    wait_until(lambda: not processes_of(run_dir), timeout=20)
    again = login.run("train", *overrides(run_dir.name, "launch=hostfile", hosts))
    assert again.returncode == 0, again.stdout + again.stderr
    assert first_difference(exact(run_dir), undisturbed) == ""


THREE = "node1 slots=1\nnode2 slots=1\nnode3 slots=1\n"


def test_a_killed_rank_starts_again_without_the_user(login, hosts, undisturbed):
    run_dir = login.folder / "again"
    command = login.start("train", *overrides("again", "launch=hostfile", hosts, "launch.restarts=3"))
    wait_until(lambda: at_step(run_dir, 6))
    ranks_of(run_dir)["1"].kill()
    assert command.wait(timeout=180) == 0, login.log
    assert "rank 1 on node2 was killed by SIGKILL" in login.log
    assert not processes_of(run_dir)
    assert first_difference(exact(run_dir), undisturbed) == ""


@pytest.mark.slow
@pytest.mark.parametrize("goes_on", ["spare", "fewer"])
def test_a_lost_host_is_replaced_or_done_without(login, machines, undisturbed, goes_on):
    """To the bit on a spare; with the same losses on one host."""
    run_dir = login.folder / f"lost-{goes_on}"
    (login.folder / f"hosts-{goes_on}").write_text(
        THREE if goes_on == "spare" else THREE.replace("node3 slots=1\n", "")
    )
    key = "launch.spares=1" if goes_on == "spare" else "launch.min_nodes=1"
    launch = ["launch=hostfile", f"launch.hostfile=hosts-{goes_on}", "launch.restarts=3", key]
    command = login.start("train", *overrides(run_dir.name, *launch))
    wait_until(lambda: at_step(run_dir, 8))
    machines.kill("node2")
    try:
        assert command.wait(timeout=240) == 0, login.log
    finally:
        machines.start("node2")
    rows = exact(run_dir)
    assert result(run_dir)["world_size"] == (2 if goes_on == "spare" else 1)
    if goes_on == "spare":
        assert first_difference(rows, undisturbed) == ""
    losses = [[(row["step"], row["loss"]) for row in some if "loss" in row] for some in (rows, undisturbed)]
    assert [step for step, _ in losses[0]] == [step for step, _ in losses[1]]
    assert max(abs(one / other - 1) for (_, one), (_, other) in zip(*losses, strict=True)) < 1e-6


@needs("mpirun", "openmpi-bin")
def test_an_mpi_of_another_kind_is_refused(login: Login, tmp_path):
    """A foreign mpirun, found by its version, and ranks that nobody counts."""
    foreign = tmp_path / "mpirun"
    foreign.write_text("#!/bin/sh\necho 'HYDRA build details: Version: 4.2'\n")
    foreign.chmod(0o755)
    done = login.run("train", *overrides("foreign", "launch=openmpi", f"launch.mpirun={foreign}"))
    assert done.returncode == 2
    assert "this is not Open MPI's mpirun (HYDRA build details" in done.stderr
    alone = login.call("env", "PMIX_RANK=1", sys.executable, "-m", "dstune", "train", *overrides("alone"))
    assert alone.returncode == 2
    assert "does not say how many ranks there are" in alone.stderr
    assert not (login.folder / "alone").exists()


@pytest.mark.slow
@needs("mpirun", "openmpi-bin")
def test_a_plain_mpirun_over_hosts_and_a_folder_that_they_do_not_share(login, hosts, machines, undisturbed):
    """Ranks of two hosts meet through mpi4py; a run directory of each node's own is refused by its name."""
    pytest.importorskip("mpi4py", reason="not installed (pip install '.[mpi]' in a clone of dstune)")
    names = ("PATH", "PYTHONPATH", "DSTUNE_CACHE", "HF_HUB_OFFLINE", "OMP_NUM_THREADS", "DS_ACCELERATOR")
    exported = [word for name in names for word in ("-x", name)]
    root = ["env", "OMPI_ALLOW_RUN_AS_ROOT=1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1"]
    program = [*root, "mpirun", "-n", "2", "--host", "node1:1,node2:1", "--bind-to", "none", *exported]
    program += [sys.executable, "-m", "dstune", "train"]
    done = login.call(*program, *overrides("plain"))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert first_difference(exact(login.folder / "plain"), undisturbed) == ""
    own = login.folder / "own"
    own.mkdir()
    assert machines.on("node2", "mount", "-t", "tmpfs", "none", str(own)).returncode == 0
    try:
        refused = login.call(*program, *overrides("own/run"))
    finally:
        machines.on("node2", "umount", str(own))
    assert refused.returncode == 2, refused.stdout[-3000:] + refused.stderr[-3000:]
    assert "it is not there on node2" in refused.stderr + refused.stdout
    assert not (own / "run").exists()
