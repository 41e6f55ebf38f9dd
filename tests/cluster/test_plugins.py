"""The plugins of `examples/plugins` by other launchers: the files travel with the run directory, and the curve is the same."""

from __future__ import annotations

import json
import sys

import pytest
from cluster.conftest import first_difference
from support.command import exact, result
from support.examples import SPLIT, TOGETHER, overrides, prepare

pytestmark = pytest.mark.cluster
ON_TWO_HOSTS = {
    "launch=slurm": ["launch=slurm", "launch.nodes=2"],
    "launch=openmpi": ["launch=openmpi", "launch.hostfile=hosts"],
    "launch=hostfile": ["launch=hostfile", "launch.hostfile=hosts"],
}


@pytest.mark.timeout(1500)
def test_all_six_at_once_by_every_launcher(on_slurm):
    folder = on_slurm.folder
    prepare(folder)
    (folder / "hosts").write_text("node1 slots=1\nnode2 slots=1\n")

    def given(run: str, steps: int, *further: str) -> list[str]:
        return overrides(TOGETHER, run, steps, *SPLIT, "schedule=constant", "zero=stage2", *further)

    def train(run: str, steps: int, *further: str, program: tuple[str, ...] = ()) -> None:
        done = on_slurm.run(*(() if program else ("train",)), *given(run, steps, *further), program=program)
        assert done.returncode == 0, f"{run}: {done.stdout[-3000:]}{done.stderr[-3000:]}"

    train("local", 6, "launch.processes=2")
    expected = exact(folder / "local")
    for number, (launcher, settings) in enumerate(ON_TWO_HOSTS.items()):
        if number == 0:  # stopped and continued
            train(f"on-{number}", 3, *settings)
        train(f"on-{number}", 6, *settings)
        assert json.loads((folder / f"on-{number}" / "environment.json").read_text())["hosts"] == ["node1", "node2"]
        assert result(folder / f"on-{number}")["world_size"] == 2
        rows = [row for row in exact(folder / f"on-{number}") if number or row["step"] > 3]
        assert first_difference(rows, [row for row in expected if number or row["step"] > 3]) == "", launcher
    on_slurm.env |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    train("mpirun", 6, program=("mpirun", "-n", "2", "--oversubscribe", sys.executable, "-m", "dstune", "train"))
    assert first_difference(exact(folder / "mpirun"), expected) == ""
    train("srun", 6, program=("srun", "-N2", "--ntasks-per-node=1", sys.executable, "-m", "dstune", "train"))
    assert first_difference(exact(folder / "srun"), expected) == ""
