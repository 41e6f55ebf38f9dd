"""Determines which rank this process is, from the variables that launchers set. Standard library only."""

from __future__ import annotations

import ctypes
import os
import re
import signal
import sys
from collections.abc import Mapping
from dataclasses import dataclass

from dstune.core.errors import Problem, UserError

LAUNCHER_PID = "DSTUNE_LAUNCHER_PID"
"""Variable of ranks that dstune started: the launcher's process id. Ranks end when that process ends."""
LAUNCH_ID = "DSTUNE_LAUNCH_ID"
"""Variable with the id of a launch, which all processes of its ranks inherit."""

STORE = "DSTUNE_STORE"
"""Variable with the file of the rendezvous on one machine, in the launch's folder. Other processes could take a port."""
FORK_SERVER = "DSTUNE_FORK_SERVER"
"""For commands that start ranks, never for ranks: the folder of the fork server that is offered to them."""
GROUP_SECRET = "DSTUNE_GROUP_SECRET"
"""Variable with the secret of a launch, by which its ranks authenticate each other."""
RUN_SHA256 = "DSTUNE_RUN_SHA256"
"""Variable with the digest of the `run.yaml` that the launching process wrote: ranks obey no other one."""

NOTICES = (signal.SIGUSR1, signal.SIGUSR2)


@dataclass(frozen=True)
class RankEnv:
    """This process among the ranks of one run."""

    rank: int
    """Place among all ranks, 0 ... world_size - 1."""
    world_size: int
    """Number of ranks on all nodes."""
    local_rank: int
    """Place among the ranks of this node, which is also the index of its GPU."""
    local_size: int
    """Number of ranks on this node."""
    source: str
    """Who set the variables: `environment` (torchrun, deepspeed, dstune), `openmpi`, `pmi` or `slurm`."""


def from_environment(env: Mapping[str, str]) -> RankEnv | None:
    """Return the rank that a launcher gave this process; None outside a distributed launch.

    `RANK` with `WORLD_SIZE` always makes a rank, also in a world of one (`deepspeed --num_gpus 1`). Open MPI, PMI and
    SLURM also mark single processes outside a distributed launch (`mpirun -n 1`, a bare sbatch step), so with them a
    world of one does not count. If several launchers have set variables, the innermost and most specific one wins:
    RANK, then Open MPI, PMI, SLURM (mpirun inside an sbatch script has both). srun also sets PMI's rank and size
    (`--mpi=pmi2`), but not the number of ranks on the node: if both agree, SLURM's variables are used.

    Raises:
        UserError: a variable is no number, the rank is not below the world size, or the number of ranks is not known.
    """
    for find in (_torch_style, _openmpi, _pmi, _slurm):
        rank_env = find(env)
        if rank_env is not None:
            _check(rank_env)
            return rank_env
    _refuse_unknown_launcher(env)
    return None


RANKS = ("PMIX_RANK", "PMI_RANK", "MV2_COMM_WORLD_RANK", "PALS_RANKID", "FLUX_TASK_RANK", "ALPS_APP_PE")
SIZES = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS")


def _refuse_unknown_launcher(env: Mapping[str, str]) -> None:
    """Raise UserError for a rank of a launcher that does not state the number of ranks: each rank would start a separate run."""
    rank = next((name for name in RANKS if env.get(name)), None)
    if rank is None or any(env.get(name) for name in SIZES):
        return
    reason = "an MPI that dstune does not know started this process, and does not say how many ranks there are"
    fix = "export RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE to the ranks; outside MPI: unset " + rank
    raise UserError(Problem("environment", reason, fix, f"{rank}={env[rank]}"))


def _torch_style(env: Mapping[str, str]) -> RankEnv | None:
    if not (env.get("RANK") and env.get("WORLD_SIZE")):
        return None
    world_size = _number(env, "WORLD_SIZE")
    # torchrun sets LOCAL_WORLD_SIZE, DeepSpeed's launcher LOCAL_SIZE; without either, all ranks are on one node.
    local_size = _first(env, ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"), world_size)
    rank = _number(env, "RANK")
    return RankEnv(rank, world_size, _first(env, ("LOCAL_RANK",), rank % max(local_size, 1)), local_size, "environment")


def _openmpi(env: Mapping[str, str]) -> RankEnv | None:
    if not (env.get("OMPI_COMM_WORLD_SIZE") and env.get("OMPI_COMM_WORLD_RANK")):
        return None
    rank, world_size = _number(env, "OMPI_COMM_WORLD_RANK"), _number(env, "OMPI_COMM_WORLD_SIZE")
    local_size = _first(env, ("OMPI_COMM_WORLD_LOCAL_SIZE",), world_size)
    local_rank = _first(env, ("OMPI_COMM_WORLD_LOCAL_RANK",), rank % max(local_size, 1))
    return _unless_alone(RankEnv(rank, world_size, local_rank, local_size, "openmpi"))


def _pmi(env: Mapping[str, str]) -> RankEnv | None:
    if not (env.get("PMI_RANK") and env.get("PMI_SIZE")):
        return None
    rank, world_size = _number(env, "PMI_RANK"), _number(env, "PMI_SIZE")
    step = _slurm(env)
    # mpiexec starts its own processes through srun as well, but one for each node: that step has fewer tasks.
    if step is not None and (step.rank, step.world_size) == (rank, world_size):
        return step
    # MPICH and Intel MPI (Hydra process manager), Cray PALS, MVAPICH2.
    names = ("MPI_LOCALNRANKS", "PMI_LOCAL_SIZE", "PALS_LOCAL_SIZE", "MV2_COMM_WORLD_LOCAL_SIZE")
    local_size = _first(env, names, world_size)
    names = ("MPI_LOCALRANKID", "PMI_LOCAL_RANK", "PALS_LOCAL_RANKID", "MV2_COMM_WORLD_LOCAL_RANK")
    local_rank = _first(env, names, rank % max(local_size, 1))
    return _unless_alone(RankEnv(rank, world_size, local_rank, local_size, "pmi"))


def _slurm(env: Mapping[str, str]) -> RankEnv | None:
    # A batch script itself has SLURM_PROCID=0 and SLURM_NTASKS, but no SLURM_STEP_NUM_TASKS: only srun's steps do.
    if not (env.get("SLURM_PROCID") and env.get("SLURM_STEP_NUM_TASKS")):
        return None
    rank, world_size = _number(env, "SLURM_PROCID"), _number(env, "SLURM_STEP_NUM_TASKS")
    node = _first(env, ("SLURM_NODEID",), 0)
    local_size = _tasks_on_node(env.get("SLURM_STEP_TASKS_PER_NODE", ""), node, world_size)
    local_rank = _first(env, ("SLURM_LOCALID",), rank % max(local_size, 1))
    return _unless_alone(RankEnv(rank, world_size, local_rank, local_size, "slurm"))


def _tasks_on_node(listing: str, node: int, default: int) -> int:
    """Return the number at place `node` of SLURM's listing, in which `2(x3),1` is 2, 2, 2, 1; `default` if it is shorter."""
    counts: list[int] = []
    for count, repeat in re.findall(r"(\d+)(?:\(x(\d+)\))?", listing):
        counts += [int(count)] * int(repeat or 1)
    return counts[node] if node < len(counts) else default


def _unless_alone(rank_env: RankEnv) -> RankEnv | None:
    return rank_env if rank_env.world_size > 1 else None


def _number(env: Mapping[str, str], name: str) -> int:
    try:
        return int(env[name])
    except ValueError:
        reason = "the environment variable must be a whole number"
        raise UserError(
            Problem(name, reason, f"unset {name}, or start dstune through its launcher", env[name])
        ) from None


def _first(env: Mapping[str, str], names: tuple[str, ...], default: int) -> int:
    for name in names:
        if env.get(name):
            return _number(env, name)
    return default


def _check(rank_env: RankEnv) -> None:
    if not (
        0 <= rank_env.rank < rank_env.world_size
        and 0 <= rank_env.local_rank < rank_env.local_size <= rank_env.world_size
    ):
        ranks_text = (
            f"rank {rank_env.rank} of {rank_env.world_size}, local rank {rank_env.local_rank} of {rank_env.local_size}"
        )
        reason = f"the launcher's variables contradict each other ({rank_env.source})"
        fix = "unset RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE to let dstune start the ranks"
        raise UserError(Problem("environment", reason, fix, ranks_text))


forked_by: int | None = None
"""In a forked rank, its keeper (`dstune/launch/local/fork_server.py`), which ends it when the launcher ends."""


def hold_notices() -> None:
    """Block the signals by which schedulers announce the end of a job, until this rank can save.

    Their default action ends a process, and one may come while modules are imported. `take_notices` delivers it.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, NOTICES)


def take_notices() -> None:
    """Unblock the signals of `hold_notices`, which delivers pending ones. Call it when the handlers are installed."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, NOTICES)


def die_with_parent() -> None:
    """Ask the kernel to kill this process when the process that started it dies, however it dies (Linux only).

    A rank that dstune started calls this first. It does nothing in a rank that another launcher started, whose way of
    ending its ranks is left alone. On other systems, only the launcher's guard process ends the ranks.
    """
    launcher = os.environ.get(LAUNCHER_PID)
    if not launcher or not sys.platform.startswith("linux"):
        return
    set_parent_death_signal = 1  # PR_SET_PDEATHSIG of linux/prctl.h
    ctypes.CDLL(None, use_errno=True).prctl(set_parent_death_signal, signal.SIGKILL, 0, 0, 0)
    # The launcher may have died before the call above; then the orphan already has another parent and gets no signal.
    if os.getppid() != (forked_by or int(launcher)):
        os._exit(1)
