"""Cases of `gpu_report.py` on several GPUs, started by `dstune train` as a user starts them: `make gpu-report PART=5 GPUS=8`."""

from __future__ import annotations

import json
import os
import subprocess
import sys

from benchmarks.gpu_bench import Bench, case, result


def on_all_gpus(bench: Bench, name: str, *words: str) -> None:
    """Report a run with a rank on each GPU: what it reached, or why it failed."""
    gpus = int(os.environ.get("GPUS", "1"))
    if bench.simulate or gpus == 1:
        bench.row(run=name, failed="needs several GPUs: GPUS=8")
        return
    command = [sys.executable, "-m", "dstune", "train", f"run.dir={bench.folder / name}", "data=files"]
    command += [f"model.path={bench.tiny_model()}", f"data.train={bench.dialogues(400)}", "data.max_length=128"]
    command += [f"launch.processes={gpus}", "trainer.micro_batch_size=2", f"trainer.global_batch_size={4 * gpus}"]
    command += ["trainer.max_steps=4", "trainer.epochs=100", *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=bench.folder)
    if done.returncode:
        bench.row(run=name, failed="\n".join((done.stdout + done.stderr).splitlines()[-8:])[-600:])
        return
    figures = result(bench.folder / name)
    losses = str([round(loss, 4) for loss in figures["losses"]])
    bench.row(run=name, losses=losses, tokens_per_second=figures["tokens_per_second"])


@case
def nccl(bench: Bench) -> None:
    """Report what `dstune doctor` says: NCCL and the bandwidth between all GPUs among it."""
    if bench.simulate:
        bench.row(run="nccl", failed="needs several GPUs: GPUS=8")
        return
    command = [sys.executable, "-m", "dstune", "doctor", "--json", f"launch.processes={os.environ.get('GPUS', '1')}"]
    done = subprocess.run(command, capture_output=True, text=True)
    if not done.stdout:
        bench.row(run="nccl", failed=done.stderr[-600:])
        return
    for check in json.loads(done.stdout)["checks"]:
        bench.row(check=check["name"], status=check["status"], detail=check["detail"][:200])


@case
def ranks(bench: Bench) -> None:
    for stage in ("stage1", "stage2", "stage3"):
        on_all_gpus(bench, stage, f"zero={stage}", "trainer.precision=fp32")
    on_all_gpus(bench, "no-overlap", "zero=stage2", "zero.overlap_comm=false")


@case
def ulysses(bench: Bench) -> None:
    on_all_gpus(bench, "ulysses", "parallel=ulysses", "parallel.size=2", "trainer.precision=bf16")


@case
def tensor(bench: Bench) -> None:
    on_all_gpus(bench, "tensor", "parallel=tensor", "parallel.size=2", "zero=stage1", "trainer.precision=bf16")
