"""How trials that run at the same time share GPUs and cores."""

from __future__ import annotations

import pytest

from dstune.config.sweep_schema import GridConfig
from dstune.core.errors import UserError
from dstune.launch.local.config import LocalConfig
from dstune.launch.openmpi.config import OpenMpiConfig
from dstune.launch.slurm.config import SlurmConfig
from dstune.sweep.devices import Devices, here, share, slots
from tests.support.configs import run_config

EIGHT = Devices(tuple("01234567"), tuple(range(16)))
CPU = Devices((), (0, 1, 2, 3, 4))


def of(parallel: int, devices: Devices, *, ranks: int | None = None, launch: object | None = None):
    config = run_config(sweep=GridConfig(parallel=parallel), launch=launch or LocalConfig(processes=ranks))
    return slots(config, devices, [ranks])


def test_gpus_are_divided():
    found = of(2, EIGHT)
    assert [slot.env["CUDA_VISIBLE_DEVICES"] for slot in found] == ["0,1,2,3", "4,5,6,7"]
    assert [slot.cores for slot in found] == [tuple(range(8)), tuple(range(8, 16))]
    assert [slot.env["CUDA_VISIBLE_DEVICES"] for slot in of(3, EIGHT)] == ["0,1", "2,3", "4,5"]


def test_as_many_gpus_as_a_trial_has_ranks():
    assert [slot.env["CUDA_VISIBLE_DEVICES"] for slot in of(3, EIGHT, ranks=1)] == ["0", "1", "2"]
    named = Devices(("GPU-aa", "MIG-b"), (0, 1))
    assert [slot.env["CUDA_VISIBLE_DEVICES"] for slot in of(2, named, ranks=1)] == ["GPU-aa", "MIG-b"]


def test_cores_are_divided():
    found = of(2, CPU, ranks=1)
    assert [slot.cores for slot in found] == [(0, 1, 2), (3, 4)]
    assert not any(slot.env for slot in found)
    assert sorted(core for number in range(3) for core in share(range(8), number, 3)) == list(range(8))


def test_a_single_trial_has_everything():
    (slot,) = of(1, EIGHT)
    assert not slot.env
    assert not slot.cores


def test_jobs_in_flight_share_nothing_here():
    assert len(of(20, CPU, launch=SlurmConfig())) == 20
    assert len(of(1, CPU, launch=OpenMpiConfig())) == 1


@pytest.mark.parametrize(
    ("parallel", "devices", "ranks", "fix"),
    [
        (9, EIGHT, None, "sweep.parallel=8"),
        (3, EIGHT, 4, "sweep.parallel=2"),
        (2, EIGHT, 9, "launch.processes=8 with sweep.parallel=1"),
        (6, CPU, 1, "sweep.parallel=5"),
    ],
)
def test_more_than_there_are(parallel: int, devices: Devices, ranks: int | None, fix: str):
    with pytest.raises(UserError) as error:
        of(parallel, devices, ranks=ranks)
    (problem,) = error.value.problems
    assert (problem.where, problem.value, problem.fix) == ("sweep.parallel", str(parallel), fix)


def test_the_gpus_that_are_visible():
    assert here({"CUDA_VISIBLE_DEVICES": "3, 5"}).gpus == ("3", "5")
    assert here({"CUDA_VISIBLE_DEVICES": "3,-1,5"}).gpus == ("3",)
    assert here({"CUDA_VISIBLE_DEVICES": ""}).gpus == ()
    assert here({"CUDA_VISIBLE_DEVICES": ""}).cores
