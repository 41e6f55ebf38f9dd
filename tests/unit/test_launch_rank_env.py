"""The variables of each launcher, as the launchers really set them."""

import os
import subprocess
import sys

import pytest

from dstune.core import rank_env
from dstune.core.errors import UserError
from dstune.core.rank_env import RankEnv, from_environment

CASES = {
    "nothing": ({}, None),
    "torchrun": (
        {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "MASTER_PORT": "29500"},
        RankEnv(5, 8, 1, 4, "environment"),
    ),
    "deepspeed": (
        {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_SIZE": "2", "CROSS_RANK": "1", "CROSS_SIZE": "2"},
        RankEnv(3, 4, 1, 2, "environment"),
    ),
    "deepspeed with one process is still a worker": (
        {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_SIZE": "1"},
        RankEnv(0, 1, 0, 1, "environment"),
    ),
    "rank and world size alone": ({"RANK": "1", "WORLD_SIZE": "2"}, RankEnv(1, 2, 1, 2, "environment")),
    "a world size without a rank": ({"WORLD_SIZE": "4"}, None),
    "empty variables": ({"RANK": "", "WORLD_SIZE": ""}, None),
    "open mpi": (
        {
            "OMPI_COMM_WORLD_RANK": "6",
            "OMPI_COMM_WORLD_SIZE": "8",
            "OMPI_COMM_WORLD_LOCAL_RANK": "2",
            "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
        },
        RankEnv(6, 8, 2, 4, "openmpi"),
    ),
    "open mpi with one process": ({"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"}, None),
    "mpich": (
        {"PMI_RANK": "3", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"},
        RankEnv(3, 4, 1, 2, "pmi"),
    ),
    "pmi without local variables": ({"PMI_RANK": "1", "PMI_SIZE": "2"}, RankEnv(1, 2, 1, 2, "pmi")),
    "pmi with one process": ({"PMI_RANK": "0", "PMI_SIZE": "1"}, None),
    "srun with PMI-2": (
        {
            "PMI_RANK": "9",
            "PMI_SIZE": "16",
            "SLURM_PROCID": "9",
            "SLURM_STEP_NUM_TASKS": "16",
            "SLURM_LOCALID": "1",
            "SLURM_NODEID": "1",
            "SLURM_STEP_TASKS_PER_NODE": "8(x2)",
        },
        RankEnv(9, 16, 1, 8, "slurm"),
    ),
    "mpich inside a slurm job, its proxies started by srun": (
        {
            "PMI_RANK": "9",
            "PMI_SIZE": "16",
            "MPI_LOCALRANKID": "1",
            "MPI_LOCALNRANKS": "8",
            "SLURM_PROCID": "1",
            "SLURM_STEP_NUM_TASKS": "2",
            "SLURM_LOCALID": "0",
            "SLURM_NODEID": "1",
            "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
        },
        RankEnv(9, 16, 1, 8, "pmi"),
    ),
    "srun on three nodes": (
        {
            "SLURM_PROCID": "6",
            "SLURM_STEP_NUM_TASKS": "7",
            "SLURM_LOCALID": "0",
            "SLURM_NODEID": "3",
            "SLURM_STEP_TASKS_PER_NODE": "2(x3),1",
        },
        RankEnv(6, 7, 0, 1, "slurm"),
    ),
    "bare sbatch step": ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}, None),
    "srun --pty shell": ({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_LOCALID": "0"}, None),
    "mpirun inside a slurm step of one task": (
        {
            "SLURM_PROCID": "0",
            "SLURM_STEP_NUM_TASKS": "1",
            "OMPI_COMM_WORLD_RANK": "1",
            "OMPI_COMM_WORLD_SIZE": "2",
            "OMPI_COMM_WORLD_LOCAL_RANK": "1",
            "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
        },
        RankEnv(1, 2, 1, 2, "openmpi"),
    ),
    "deepspeed over mpirun": (
        {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "9"},
        RankEnv(1, 2, 1, 2, "environment"),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_launchers(name):
    variables, expected = CASES[name]
    assert from_environment(variables) == expected


@pytest.mark.parametrize(
    ("variables", "named"),
    [
        ({"RANK": "one", "WORLD_SIZE": "2"}, "RANK=one"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "contradict"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "contradict"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "4", "LOCAL_WORLD_SIZE": "2"}, "contradict"),
        ({"PMIX_RANK": "0"}, "PMIX_RANK=0: an MPI that dstune does not know"),
    ],
)
def test_contradictions_are_refused(variables, named):
    with pytest.raises(UserError, match=named):
        from_environment(variables)


def test_a_rank_whose_launcher_is_gone_ends(tmp_path):
    code = "import dstune.core.rank_env as r; r.die_with_parent(); print('alive')"
    for pid, expected in ((os.getpid(), (0, "alive\n")), (1, (1, ""))):
        env = {**os.environ, rank_env.LAUNCHER_PID: str(pid)}
        done = subprocess.run([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, text=True)
        assert (done.returncode, done.stdout) == expected
