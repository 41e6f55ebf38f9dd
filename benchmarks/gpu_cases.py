"""The cases of `gpu_report.py`, each in a process of its own: `python gpu_cases.py CASE FOLDER [--simulate]`.

A case writes what it has measured so far into FOLDER/measured.json after each row, so that a limit cuts off the rest alone. Single
operations are in `gpu_kernels.py`, models of real size and TRL in `gpu_rivals.py`, several GPUs in `gpu_several.py`.
"""

from __future__ import annotations

import gzip
import json
import os
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import gpu_kernels, gpu_kit, gpu_rivals, gpu_several, gpu_trace  # noqa: E402  # each adds its cases
from benchmarks.gpu_bench import CASES, ONE_AND_A_HALF, Bench, case  # noqa: E402

__all__ = ["CASES", "gpu_kernels", "gpu_rivals", "gpu_several"]
SWITCHES = ("fused_norms", "fused_activations", "fused_rotary")

EIGHT_LAYERS = ONE_AND_A_HALF | {"num_hidden_layers": 8}


@case
def imports(bench: Bench) -> None:
    """Measure seconds that each library takes to import, its version, and what dstune requires and the machine has not."""
    import subprocess

    for name in (
        "torch",
        "deepspeed",
        "transformers",
        "peft",
        "datasets",
        "trl",
        "liger_kernel",
        "flash_attn",
        "bitsandbytes",
    ):
        code = f"import time; began = time.time(); import {name} as it; print(time.time() - began, getattr(it, '__version__', ''))"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        if done.returncode:
            bench.row(imported=name, absent=(done.stderr.strip().splitlines() or ["no error message"])[-1][:300])
        else:
            seconds, _, version = done.stdout.splitlines()[-1].partition(" ")
            bench.row(imported=name, seconds=float(seconds), version=version)
    for problem in gpu_kit.missing_here():
        bench.row(required=problem)


@case
def losses(bench: Bench) -> None:
    """Compare losses and gradient norms at each stage with those of the CPU in fp32."""
    words = (f"model.path={bench.tiny_model()}", "trainer.precision=fp32", "optimizer.lr=1e-3")
    expected = bench.run("cpu", *words, "zero=stage2", on_cpu=True)
    for stage in ("stage2", "stage3", "stage1"):
        result = bench.run_and_report(f"{stage}-fp32", *words, f"zero={stage}")
        if result:
            apart = {
                key: max(abs(a / b - 1) for a, b in zip(result[key], expected[key], strict=True))
                for key in ("losses", "norms")
            }
            bench.row(run=f"{stage}-fp32 against the CPU", loss_apart=apart["losses"], norm_apart=apart["norms"])
    for stage in ("stage2", "stage3"):
        bench.run_and_report(f"{stage}-bf16", words[0], "trainer.precision=bf16", f"zero={stage}")


@case
def verify(bench: Bench) -> None:
    """Compare gradients, collectives and kernels with their definitions by dstune-verify, and keep the certificate."""
    import subprocess

    file = bench.folder / "certificate.json"
    command = [
        sys.executable,
        "-m",
        "dstune_verify",
        "--certificate",
        str(file),
        "--ranks",
        os.environ.get("GPUS", "1"),
    ]
    command += ["--cases", "packages,golden"] if bench.simulate else []
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if not file.is_file():
        bench.row(run="dstune-verify", failed=done.stderr[-600:])
        return
    certificate = json.loads(file.read_text())
    bench.row(run="dstune-verify", **certificate["counts"])
    for outcome in certificate["cases"]:
        if outcome["status"] != "right":
            known = (outcome["known"] or {}).get("source", "")
            bench.row(case=outcome["case"], status=outcome["status"], known=known, detail=outcome["detail"][:200])


@case
def packed_step(bench: Bench) -> None:
    """Time steps of packed rows of 4k, and count how often each line of a step waits for the device."""
    words = bench.packed(EIGHT_LAYERS, "eight-layers", steps=6, rows=4)
    waits = bench.folder / "waits.json"
    os.environ["WAITS"] = str(waits)
    bench.run_and_report("packed", *words, "zero=stage2", "trainer.profile_steps=2")
    if waits.exists():
        for place, times in json.loads(waits.read_text()).items():
            bench.row(waits_at=place, times_a_step=times)


@case
def trace(bench: Bench) -> None:
    """Trace where two steps of full 1.5B spend their time, by kind of kernel, and how much of what is copied and reduced at
    ZeRO-2 runs beside the computation."""
    words = bench.packed(ONE_AND_A_HALF, "one-and-a-half", steps=5, rows=4)
    if not bench.run_and_report("traced", *words, "zero=stage2", "trainer.profile_steps=2"):
        return
    for file in sorted((bench.folder / "traced" / "profile").glob("*.json.gz")):
        for figures in gpu_trace.summarize(json.loads(gzip.decompress(file.read_bytes()))):
            bench.row(**figures)


@case
def whole_steps(bench: Bench) -> None:
    """Time the fused kernels, each switched alone, in whole steps of packed rows: tokens a second and peak beside the default."""
    words = bench.packed(EIGHT_LAYERS, "eight-layers", steps=6, rows=4)
    plain = bench.run_and_report("none fused", *words, "zero=stage2", *(f"model.{name}=false" for name in SWITCHES))
    for switch in SWITCHES:
        result = bench.run_and_report(
            switch, *words, "zero=stage2", *(f"model.{name}={name == switch}".lower() for name in SWITCHES)
        )
        if plain and result:
            bench.row(run=f"{switch} beside none", speed=result["tokens_per_second"] / plain["tokens_per_second"])


@case
def recompute(bench: Bench) -> None:
    """Measure ZeRO-3 by which activations are computed again."""
    words = bench.packed(EIGHT_LAYERS, "eight-layers", steps=5, rows=4, micro=1)
    words = [word for word in words if not word.startswith("trainer.activation_checkpointing")]
    for setting in ("true", "selective", "false"):
        bench.run_and_report(f"stage3 {setting}", *words, "zero=stage3", f"trainer.activation_checkpointing={setting}")


@case
def plan(bench: Bench) -> None:
    """Compare the planner's memory with the allocator's peak, which has neither the CUDA context nor other libraries in it."""
    from dstune.config.compose import compose
    from dstune.config.schema import Precision
    from dstune.planning.architecture import architecture
    from dstune.planning.memory import memory
    from dstune.planning.setup import head_of, setup

    words = bench.packed(ONE_AND_A_HALF, "one-and-a-half", steps=4, rows=2, micro=1)
    values = json.loads((bench.folder / "one-and-a-half" / "config.json").read_text())
    for stage in ("stage2", "stage3"):
        result = bench.run_and_report(f"plan-{stage}", *words, f"zero={stage}")
        config = compose(["data=files", *words, f"zero={stage}"]).config
        model = architecture(values, head_of(config))
        options = {"ranks": 1, "ranks_per_node": 1, "on_gpu": True, "precision": Precision.bf16, "values": values}
        planned = memory(setup(config, model, **options))
        tensors, whole = sum(planned.parts.values()) / 2**30, planned.total / 2**30
        if result:
            figures = {"planned_gib": whole, "of_it_tensors": tensors, "peak_gib": result["peak_gib"]}
            bench.row(run=f"plan-{stage}", **figures, ratio=tensors / max(result["peak_gib"], 1e-9))


@case
def out_of_memory(bench: Bench) -> None:
    """Try `trainer.micro_batch_size=auto`, and show what a run says that does not fit."""
    words = bench.packed(EIGHT_LAYERS, "eight-layers", steps=2, rows=bench.size(64, 8), micro="auto")
    bench.run_and_report("auto", *words, "zero=stage2")
    if bench.simulate:
        bench.row(run="forced", failed="a simulated device is never full")
        return
    words = [word for word in words if not word.startswith(("trainer.micro_batch", "trainer.activation"))]
    bench.run_and_report(
        "forced", *words, "zero=stage2", "trainer.micro_batch_size=64", "trainer.activation_checkpointing=false"
    )


@case
def importance(bench: Bench) -> None:
    words = (f"model.path={bench.tiny_model()}", "method=importance", "method.score_steps=2", "zero=stage2")
    bench.run_and_report("importance", *words)


@case
def preference(bench: Bench) -> None:
    from tests.support.tiny import write_preferences

    data = write_preferences(bench.folder / "pairs.jsonl", 60)
    words = (f"model.path={bench.tiny_model()}", f"data.train={data}", "zero=stage2", "method=lora")
    bench.run_and_report("dpo", "task=preference", *words)


@case
def classification(bench: Bench) -> None:
    from tests.support.tiny import save_encoder, write_labelled

    model, data = save_encoder(bench.folder / "encoder"), write_labelled(bench.folder / "labels.jsonl", 60)
    bench.run_and_report(
        "classifier", f"model.path={model}", "task=classification", f"data.train={data}", "zero=stage3"
    )


@case
def half(bench: Bench) -> None:
    if bench.simulate:
        bench.row(run="fp16", failed="a CPU has no kernels of fp16 for several layers")
        return
    model = f"model.path={bench.tiny_model()}"
    bench.run_and_report("fp16", model, "trainer.precision=fp16", "zero=stage2")
    bench.run_and_report("tf32", model, "trainer.precision=fp32", "trainer.tf32=true", "zero=stage2")


@case
def deterministic(bench: Bench) -> None:
    """Run twice with the same words, and show whether the runs are equal to the bit."""
    words = (f"model.path={bench.tiny_model()}", "trainer.precision=bf16", "trainer.deterministic=true", "zero=stage2")
    first, second = bench.run_and_report("first", *words), bench.run_and_report("second", *words)
    if first and second:
        bench.row(run="equal to the bit", value=first["losses"] == second["losses"])


@case
def resume(bench: Bench) -> None:
    """Run half of the steps with saves in the background, then the rest, beside a run without a stop."""
    if bench.simulate:
        bench.row(run="resume", failed="the simulated device has no memory of its own that a checkpoint could copy")
        return
    words = (
        *(f"model.path={bench.tiny_model()}", "trainer.precision=bf16", "zero=stage2", "trainer.deterministic=true"),
        *("checkpoint.mode=async", "checkpoint.every=2", "schedule=constant"),  # the length of a run is in no rate
    )
    whole = bench.run_and_report("whole", *words)
    bench.run_and_report("halves", *words, "trainer.max_steps=2")
    resumed = bench.run_and_report("halves", *words)
    if whole and resumed:
        bench.row(run="resumed to the bit", value=whole["losses"] == resumed["losses"])


@case
def offload(bench: Bench) -> None:
    if bench.simulate:
        bench.row(run="offload", failed="the simulated device has no memory of its own to move states from")
        return
    words = (f"model.path={bench.tiny_model()}", "zero=stage3_offload", "trainer.precision=bf16")
    bench.run_and_report("offload", *words)


@case
def qlora(bench: Bench) -> None:
    if bench.simulate:
        bench.row(run="qlora", failed="bitsandbytes has no kernels for a device that it does not know")
        return
    from tests.support.tiny import save_decoder

    wide = {"hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 16, "num_key_value_heads": 4}
    words = (f"model.path={save_decoder(bench.folder / 'wide', **wide)}", "method=qlora", "trainer.precision=bf16")
    for stage in ("stage2", "stage3"):
        bench.run_and_report(f"qlora-{stage}", *words, f"zero={stage}")


def main() -> None:
    name, folder = sys.argv[1], Path(sys.argv[2])
    CASES[name](Bench(folder, simulate="--simulate" in sys.argv))
    for checkpoints in folder.glob("*/checkpoints"):  # of models of real size
        shutil.rmtree(checkpoints)


if __name__ == "__main__":
    main()
