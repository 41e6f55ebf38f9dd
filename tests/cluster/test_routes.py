"""One experiment by every route gives one curve: two ranks on one machine, on two hosts, in SLURM jobs; and the operators'
scripts of `launch/`, copied and edited as their first lines say.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from cluster.conftest import Login, first_difference, overrides
from support.command import exact, result, wait_until

pytestmark = [pytest.mark.cluster, pytest.mark.slow]
SCRIPTS = Path(__file__).parents[2] / "launch"
STEPS = ["trainer.max_steps=10"]


def script(login: Login, name: str, run: str, *further: str) -> list[str]:
    """A copy of an operators' script with this experiment in it, ready to start."""
    text = (SCRIPTS / name).read_text()
    text = text.replace(
        "  experiment=quickstart\n", "".join(f"  '{word}'\n" for word in [*overrides(run, *STEPS), *further])
    )
    text = re.sub(r'  "run.dir=runs/slurm-.*\n', "", text)
    copy = login.folder / f"{run}-{name}"
    copy.write_text(text)
    copy.chmod(0o755)
    return [str(copy)]


def batch(login: Login, slurm, name: str, run: str, *arguments: str, options: tuple[str, ...] = ()) -> None:
    """Submit an operators' script with the size of this cluster, and wait for its end."""
    words = ["sbatch", "--parsable", "--nodes=2", "--ntasks-per-node=1", "--gres=none", "--time=10", *options]
    done = login.call(*words, *script(login, name, run), *arguments)
    assert done.returncode == 0, done.stderr
    wait_until(lambda: not slurm.call("squeue", "-h").strip(), timeout=300)


@pytest.fixture(scope="module")
def ready(on_slurm) -> Login:
    (on_slurm.folder / "hosts").write_text("node1 slots=1\nnode2 slots=1\n")
    (on_slurm.folder / ".deepspeed_env").write_text(
        "".join(
            f"{name}={on_slurm.env[name]}\n" for name in ("DS_ACCELERATOR", "OMP_NUM_THREADS", "PATH", "PYTHONPATH")
        )
        + f"DSTUNE_CACHE={on_slurm.env['DSTUNE_CACHE']}\nHF_HUB_OFFLINE=1\n"
    )
    # `dstune` of this checkout, as an installation would give it.
    programs = on_slurm.folder / "bin"
    programs.mkdir(exist_ok=True)
    (programs / "dstune").write_text(f'#!/bin/sh\nexec {sys.executable} -m dstune "$@"\n')
    (programs / "dstune").chmod(0o755)
    on_slurm.env["PATH"] = f"{programs}:{on_slurm.env['PATH']}"
    on_slurm.env |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    return on_slurm


@pytest.mark.timeout(1500)
def test_one_curve_by_every_route(ready, slurm):
    missing = [program for program in ("pdsh", "mpirun") if shutil.which(program) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} not installed (Debian: apt-get install pdsh openmpi-bin)")
    deepspeed = str(Path(sys.executable).with_name("deepspeed"))
    hostfile = ["--hostfile", "hosts", "--no_local_rank", "--module", "dstune"]
    train = ["dstune", "train"]

    def run(name: str, *words: str) -> None:
        done = ready.call(*words)
        assert done.returncode == 0, f"{name}: {done.stdout[-3000:]}{done.stderr[-3000:]}"

    def given(name: str, *further: str) -> list[str]:
        return overrides(name, *STEPS, *further)

    def trial(name: str) -> None:
        """The first of two trials, moved to where a run of that name would be."""
        words = [word for word in given(name, "launch.processes=2") if not word.startswith(("run.dir", "optimizer.lr"))]
        rates = "optimizer.lr=1e-3,2e-3"
        done = ready.call(*train, "-m", *words, rates, f"sweep.dir=of-{name}", "--json")
        assert done.returncode == 0, done.stdout + done.stderr
        first = next(trial for trial in json.loads(done.stdout)["trials"] if trial["values"]["optimizer.lr"] == 1e-3)
        (ready.folder / f"of-{name}" / first["name"]).rename(ready.folder / name)

    routes: dict[str, Callable[[str], None]] = {
        "launch=local": lambda name: run(name, *train, *given(name, "launch.processes=2")),
        "deepspeed --hostfile": lambda name: run(name, deepspeed, *hostfile, "train", *given(name)),
        "launch/hostfile.sh": lambda name: run(name, *script(ready, "hostfile.sh", name)),
        "launch=openmpi": lambda name: run(name, *train, *given(name, "launch=openmpi", "launch.hostfile=hosts")),
        "launch/mpirun.sh": lambda name: run(name, *script(ready, "mpirun.sh", name)),
        "launch/local.sh": lambda name: run(name, *script(ready, "local.sh", name, "launch.processes=2")),
        "srun dstune train": lambda name: run(name, "srun", "-N2", "--ntasks-per-node=1", *train, *given(name)),
        "launch=slurm": lambda name: run(name, *train, *given(name, "launch=slurm", "launch.nodes=2")),
        "launch/train.sbatch": lambda name: batch(ready, slurm, "train.sbatch", name),
        "trial of dstune train -m": trial,
    }
    curves = {}
    print("\n| route | ranks | loss at step 1 | loss at step 10 | grad norm at step 10 | largest difference |")
    print("| --- | --- | --- | --- | --- | --- |")
    for number, (route, start) in enumerate(routes.items()):
        name = f"route{number}"
        start(name)
        curves[route] = exact(ready.folder / name)
        rows = [row for row in curves[route] if "loss" in row]
        pairs = zip(rows, [row for row in curves["launch=local"] if "loss" in row], strict=True)
        largest = max(abs(row[key] - other[key]) for row, other in pairs for key in ("loss", "grad_norm"))
        ranks = result(ready.folder / name)["world_size"]
        first, last = rows[0], rows[-1]
        print(
            f"| `{route}` | {ranks} | {first['loss']:.6f} | {last['loss']:.6f} | {last['grad_norm']:.6f} | {largest:g} |",
            flush=True,
        )
    for route, curve in curves.items():
        assert first_difference(curve, curves["launch=local"]) == "", route


def test_an_array_of_runs(ready, slurm):
    """Each line of the file of settings is a run of its own."""
    text = (SCRIPTS / "array.sbatch").read_text()
    given = overrides("x", "trainer.max_steps=3", "launch.processes=1")
    few = [word for word in given if not word.startswith(("run.dir", "optimizer.lr"))]
    text = text.replace("  experiment=quickstart\n", "".join(f"  '{word}'\n" for word in few))
    (ready.folder / "array.sbatch").write_text(text)
    (ready.folder / "settings.txt").write_text("optimizer.lr=1e-3\noptimizer.lr=2e-3 trainer.seed=1\n")
    done = ready.call("sbatch", "--parsable", "--array=1-2", "--gres=none", "--time=10", "array.sbatch", "settings.txt")
    assert done.returncode == 0, done.stderr
    wait_until(lambda: not slurm.call("squeue", "-h").strip(), timeout=200)
    runs = [ready.folder / "runs" / f"array-{done.stdout.strip()}" / number for number in ("1", "2")]
    assert [result(run)["status"] for run in runs] == ["completed", "completed"]
    first, second = (next(row["lr"] for row in exact(run) if row["step"] == 1) for run in runs)
    assert second == pytest.approx(2 * first)
