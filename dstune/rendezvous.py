"""Where the ranks of somebody else's launch meet: MASTER_ADDR and MASTER_PORT for launchers that do not set them."""

from __future__ import annotations

import subprocess
from collections.abc import MutableMapping
from zlib import crc32

from dstune.errors import Problem, UserError
from dstune.rank_env import RankEnv

FIRST_PORT, PORTS = 20_000, 10_000
"""Ports are derived from the identity of the job below the range that kernels hand out (32768 and up on Linux)."""


def set_address(env: RankEnv, variables: MutableMapping[str, str]) -> None:
    """Set MASTER_ADDR and MASTER_PORT where the launcher left them out. What it set is kept.

    Every rank must come to the same answer without talking to the others, so the port follows from the job's identity.

    Raises:
        UserError: the launcher gives no address and the ranks are on several nodes.
    """
    if variables.get("MASTER_ADDR") and variables.get("MASTER_PORT"):
        return
    if env.source == "slurm":
        address = _first_host(variables.get("SLURM_STEP_NODELIST") or variables["SLURM_JOB_NODELIST"])
        identity = f"{variables.get('SLURM_JOB_ID')}.{variables.get('SLURM_STEP_ID')}"
    elif env.local_size == env.world_size:
        address = "127.0.0.1"
        names = ("PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid", "PMI_ID", "HYDRA_JOB_ID")
        identity = next((variables[name] for name in names if variables.get(name)), "job")
    else:
        raise UserError(
            Problem(
                "MASTER_ADDR",
                reason=f"ranks on several nodes need an address to meet at, and {env.source} gives none",
                fix="export MASTER_ADDR (host of rank 0) and MASTER_PORT to all ranks, for example mpirun -x MASTER_ADDR",
            )
        )
    variables.setdefault("MASTER_ADDR", address)
    variables.setdefault("MASTER_PORT", str(FIRST_PORT + crc32(identity.encode()) % PORTS))


def _first_host(nodes: str) -> str:
    """`n[3-4,7]` -> `n3`, by SLURM's own tool, which knows all of its notations."""
    names = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True)
    return names.stdout.split()[0]
