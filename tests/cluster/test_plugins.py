"""The plugins of `examples/plugins` by other launchers: the files travel with the run directory, and the curve is the same."""

from __future__ import annotations

import json
import sys

import pytest
from cluster.conftest import Login, first_difference
from support.command import exact, result
from support.examples import SPLIT, TOGETHER, overrides, prepare

pytestmark = pytest.mark.cluster
ON_TWO_HOSTS = {
    "slurm": ["launch=slurm", "launch.nodes=2"],
    "openmpi": ["launch=openmpi", "launch.hostfile=hosts"],
    "hostfile": ["launch=hostfile", "launch.hostfile=hosts"],
}
AROUND = {"mpirun": ("mpirun", "-n", "2", "--oversubscribe"), "srun": ("srun", "-N2", "--ntasks-per-node=1")}


def train(login: Login, run: str, steps: int, *further: str, around: tuple[str, ...] = ()) -> list[dict]:
    words = overrides(TOGETHER, run, steps, *SPLIT, "schedule=constant", "zero=stage2", *further)
    done = login.run("train", *words, program=(*around, sys.executable, "-m", "dstune"))
    assert done.returncode == 0, f"{run}: {done.stdout[-3000:]}{done.stderr[-3000:]}"
    assert result(login.folder / run)["world_size"] == 2
    return exact(login.folder / run)


@pytest.fixture(scope="module")
def expected(on_slurm) -> list[dict]:
    """The curve on two ranks of one machine."""
    prepare(on_slurm.folder)
    (on_slurm.folder / "hosts").write_text("node1 slots=1\nnode2 slots=1\n")
    on_slurm.env |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    return train(on_slurm, "local", 6, "launch.processes=2")


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("launcher", ON_TWO_HOSTS)
def test_all_six_at_once_by_every_launcher(on_slurm, expected, launcher):
    if launcher == "slurm":  # stopped and continued
        train(on_slurm, launcher, 3, *ON_TWO_HOSTS[launcher])
    rows = train(on_slurm, launcher, 6, *ON_TWO_HOSTS[launcher])
    hosts = json.loads((on_slurm.folder / launcher / "environment.json").read_text())["hosts"]
    assert hosts == ["node1", "node2"]
    after = 3 if launcher == "slurm" else 0  # an evaluation ends the first part
    assert first_difference([r for r in rows if r["step"] > after], [r for r in expected if r["step"] > after]) == ""


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("program", AROUND)
def test_all_six_at_once_inside_a_launch(on_slurm, expected, program):
    assert first_difference(train(on_slurm, program, 6, around=AROUND[program]), expected) == ""
