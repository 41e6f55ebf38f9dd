"""Inside the launchers that people have. srun: tests/cluster/test_verify.py."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

BIN = Path(sys.executable).parent
CASES = ("--cases", "ddp-fp32-", "--json", "--time-limit", "60")
RIGHT = {"ddp-fp32-accumulation-clipped": "right", "ddp-fp32-uneven-experts": "right"}
MODULE = ("-m", "dstune_verify")
STARTS = {
    "torchrun": (str(BIN / "torchrun"), "--nproc_per_node", "2", *MODULE),
    "deepspeed": (str(BIN / "deepspeed"), "--num_gpus", "2", "--master_port", "{port}", "--module", "dstune_verify"),
    "mpirun": ("mpirun", "--allow-run-as-root", "--oversubscribe", "-n", "2", sys.executable, *MODULE),
}


def start_of(launcher: str) -> tuple[str, ...]:
    if shutil.which(STARTS[launcher][0]) is None:
        pytest.skip(f"{launcher} is not installed (Debian: apt-get install openmpi-bin)")
    from dstune_verify.world import free_port

    return tuple(word.format(port=free_port()) for word in STARTS[launcher])


def cases_of(stdout: str) -> dict[str, str]:
    """Read the JSON object among a launcher's lines; there is exactly one, since rank 0 alone prints it."""
    import json

    [line] = [line for line in stdout.splitlines() if line.startswith('{"')]
    return {case["case"]: case["status"] for case in json.loads(line)["cases"]}


@pytest.mark.parametrize("launcher", ["torchrun", pytest.param("deepspeed", marks=pytest.mark.ci), "mpirun"])
def test_all_ranks_of_the_launcher_take_part(verify, launcher):
    done = verify(*CASES, start=start_of(launcher), DS_ACCELERATOR="cpu")
    assert done.code == 0, done.stderr
    assert cases_of(done.stdout) == RIGHT


@pytest.mark.ci
@pytest.mark.parametrize("launcher", STARTS)
def test_a_rank_that_dies_does_not_end_the_launcher(verify, launcher):
    fault = {"at": "dstune_verify.models:Experts.forward", "do": "exit", "value": 9, "rank": 1}
    done = verify(*CASES, start=start_of(launcher), fault=fault, DS_ACCELERATOR="cpu")
    assert done.code != 0
    assert cases_of(done.stdout) == RIGHT | {"ddp-fp32-uneven-experts": "crashed"}


def test_mpirun_over_hosts_needs_an_address(verify):
    done = verify(OMPI_COMM_WORLD_RANK="1", OMPI_COMM_WORLD_SIZE="4", OMPI_COMM_WORLD_LOCAL_SIZE="2")
    assert done.code == 2
    assert "Set MASTER_ADDR to that host for all ranks" in done.stderr
