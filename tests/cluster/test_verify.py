"""`dstune-verify` between two nodes of SLURM: by srun, and by dstune's launcher."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from dstune_verify import certificate

pytestmark = pytest.mark.cluster
ROOT = Path(__file__).parents[2]
CASES = (
    "packages-of-ranks",
    "collectives-short",
    "ddp-fp32-accumulation-clipped",
    "zero2-fp32-accumulation",
    "zero3-fp32-clipped",
)


@pytest.fixture(scope="module")
def one_file(on_slurm) -> str:
    target = on_slurm.folder / "dstune-verify.pyz"
    subprocess.run([sys.executable, ROOT / "tools" / "build_verify.py", target], check=True)
    return str(target)


def test_srun_on_two_nodes(on_slurm, one_file):
    """A rank on each node; the first one prints, and writes the certificate."""
    command = ("srun", "--nodes", "2", "--ntasks-per-node", "1", sys.executable, one_file)
    done = on_slurm.call(*command, "--cases", ",".join(CASES), "--json", "--certificate", "certificate.json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["ranks"] == 2
    assert {case["case"]: case["status"] for case in report["cases"]} == {
        **dict.fromkeys(CASES, "right"),
        "zero2-fp32-accumulation-offload": "right",
    }
    assert certificate.read(on_slurm.folder / "certificate.json") == report
    assert "node1" not in done.stdout


def test_a_configuration_on_two_nodes(on_slurm):
    settings = ["task=chat", "model.path=model", "zero=stage2", "trainer.precision=fp32"]
    done = on_slurm.run("verify", *settings, "launch=slurm", "launch.nodes=2", "--json")
    report = json.loads(done.stdout)
    statuses = {case["case"]: case["status"] for case in report["cases"]}
    assert (done.returncode, report["ranks"], statuses["yours-model"]) == (0, 2, "right"), done.stderr
    assert not list(on_slurm.folder.glob(".dstune-verify-*"))
