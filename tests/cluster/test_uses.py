"""One real, short run of each way in which dstune is started on several ranks; each must give the curve of `launch=local`.

The table of routes in `docs/evidence.md` names these tests (`tests/packaging/test_routes_table.py`).
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
from cluster.conftest import Login, first_difference, overrides
from support.command import exact, result

pytestmark = pytest.mark.cluster
SHORT = ["trainer.max_steps=4", "evaluate.every=2", "checkpoint.every=0"]
BIN = Path(sys.executable).parent
ENVIRONMENT = ("DS_ACCELERATOR", "OMP_NUM_THREADS", "PATH", "PYTHONPATH", "DSTUNE_CACHE", "HF_HUB_OFFLINE")
MODULE = ("--module", "dstune", "train")
PROGRAMS = {
    "deepspeed": (BIN / "deepspeed", "--num_gpus", "2", "--master_port", "29731", *MODULE),
    "deepspeed --no_local_rank": (
        *(BIN / "deepspeed", "--num_gpus", "2", "--master_port", "29732", "--no_local_rank"),
        *MODULE,
    ),
    "deepspeed --hostfile": (BIN / "deepspeed", "--hostfile", "hosts", *MODULE),
    "mpirun": ("mpirun", "-n", "2", "--bind-to", "none", "--oversubscribe", sys.executable, "-m", "dstune", "train"),
    "torchrun": (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "-m", "dstune", "train"),
    "accelerate launch": (
        *(sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes=2", "--num_machines=1"),
        *("--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=29733", "--module", "dstune", "train"),
    ),
    "srun": ("srun", "-N2", "--ntasks-per-node=1", sys.executable, "-m", "dstune", "train"),
}
"""What is typed before the overrides, by route."""
DEBIAN = {"deepspeed --hostfile": ("pdsh", "pdsh"), "mpirun": ("mpirun", "openmpi-bin")}
OFTEN = ("deepspeed", "deepspeed --hostfile", "mpirun")
"""Routes that `make test` has; the others start their ranks by the same code."""


def fails_without(route: str) -> None:
    program, package = DEBIAN.get(route, ("sh", ""))
    if shutil.which(program) is None:
        pytest.skip(f"{program} is not installed (Debian: apt-get install {package})")


@pytest.fixture(scope="module")
def ready(on_slurm) -> Login:
    """The login node with a hostfile, and with the variables that `deepspeed` sends to other hosts."""
    (on_slurm.folder / "hosts").write_text("node1 slots=1\nnode2 slots=1\n")
    lines = [f"{name}={on_slurm.env[name]}\n" for name in ENVIRONMENT if name in on_slurm.env]
    (on_slurm.folder / ".deepspeed_env").write_text("".join(lines))
    on_slurm.env |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    return on_slurm


@pytest.fixture(scope="module")
def local_curve(ready) -> list[dict]:
    done = ready.run("train", *overrides("local", *SHORT, "launch.processes=2"))
    assert done.returncode == 0, done.stdout + done.stderr
    return exact(ready.folder / "local")


def check(login: Login, name: str, curve: list[dict], ranks: int = 2) -> None:
    assert result(login.folder / name)["world_size"] == ranks
    assert first_difference(exact(login.folder / name), curve) == ""


@pytest.mark.parametrize(
    "route", [route if route in OFTEN else pytest.param(route, marks=pytest.mark.ci) for route in PROGRAMS]
)
def test_ranks_of_another_launcher(ready, local_curve, route):
    fails_without(route)
    name = f"under-{route.replace(' ', '-')}"
    done = ready.call(*map(str, PROGRAMS[route]), *overrides(name, *SHORT))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    check(ready, name, local_curve)


@pytest.mark.parametrize("nodes", [1, 2])
def test_a_slurm_job(ready, local_curve, nodes):
    name = f"job-of-{nodes}"
    size = ["launch=slurm", f"launch.nodes={nodes}", f"launch.processes={2 // nodes}"]
    done = ready.run("train", *overrides(name, *SHORT, *size))
    assert done.returncode == 0, done.stdout + done.stderr
    check(ready, name, local_curve)


def sweep_words(*further: str) -> list[str]:
    words = [word for word in overrides("", *SHORT) if not word.startswith(("run.dir", "optimizer.lr"))]
    return [*words, *further]


def test_a_slurm_sweep(ready):
    """An array of three trials, two at a time."""
    words = sweep_words("launch=slurm", "sweep.parallel=2", "sweep.dir=array-of-three", "optimizer.lr=1e-3,2e-3,4e-3")
    done = ready.run("train", "-m", *words, "--json", timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    trials = json.loads(done.stdout)["trials"]
    assert [trial["status"] for trial in trials] == ["completed"] * 3
    jobs = {json.loads((ready.folder / trial["run"] / "launch.json").read_text())["jobs"][-1] for trial in trials}
    assert len(jobs) == 3


def test_a_grid_that_wandb_records_offline(ready, local_curve):
    words = sweep_words("launch.processes=2", "sweep.dir=grid", "optimizer.lr=1e-3,2e-3", "tracking.wandb.mode=offline")
    done = ready.run("train", "-m", *words, "--json", timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    trials = {trial["values"]["optimizer.lr"]: trial for trial in json.loads(done.stdout)["trials"]}
    assert {trial["status"] for trial in trials.values()} == {"completed"}
    assert first_difference(exact(ready.folder / trials[1e-3]["run"]), local_curve) == ""
    for trial in trials.values():
        [folder] = (ready.folder / trial["run"] / "wandb").glob("offline-run-*")
        assert next(folder.glob("*.wandb")).stat().st_size > 0


def test_an_optuna_sweep(ready):
    space = "optimizer.lr=tag(log,interval(1e-4,1e-2))"
    words = sweep_words("launch.processes=1", "sweep=optuna", "sweep.trials=2", "sweep.dir=search", space)
    done = ready.run("train", "-m", *words, "--json", timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    trials = json.loads(done.stdout)["trials"]
    assert [trial["status"] for trial in trials] == ["completed"] * 2
    rates = [trial["values"]["optimizer.lr"] for trial in trials]
    assert len(set(rates)) == 2
    assert all(1e-4 <= rate <= 1e-2 for rate in rates)
