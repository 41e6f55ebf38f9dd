"""Cases of `gpu_report.py`: packed SFT of a 1.5B-shaped and an 8B-shaped model, by dstune, TRL and a DeepSpeed loop."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.gpu_bench import EIGHT, ONE_AND_A_HALF, Bench, case

STEPS, MICRO, GLOBAL, UNTIMED = 6, 2, 8, 2


def words_of(bench: Bench, shape: dict[str, int], name: str) -> list[str]:
    return [*bench.packed(shape, name, steps=STEPS, rows=GLOBAL, micro=MICRO), "zero=stage2"]


@case
def full_1_5b(bench: Bench) -> None:
    bench.run_and_report("full 1.5B", *words_of(bench, ONE_AND_A_HALF, "one-and-a-half"))


@case
def lora_8b(bench: Bench) -> None:
    bench.run_and_report("LoRA 8B", *words_of(bench, EIGHT, "eight"), "method=lora")


@case
def handwritten_1_5b(bench: Bench) -> None:
    """Time a DeepSpeed loop on random tokens that are ready in memory, at the same shape, lengths, accumulation and stage. Its
    rows are one sample each, so it needs no boundaries between samples."""
    import torch

    folder, length = bench.weights(bench.shape("one-and-a-half", **ONE_AND_A_HALF)), bench.size(4096, 64)
    vocabulary = json.loads((folder / "config.json").read_text())["vocab_size"]
    shape = (STEPS * GLOBAL // MICRO, 1, MICRO, length)
    ids = torch.randint(0, vocabulary, shape, generator=torch.Generator().manual_seed(0))
    torch.save({"input_ids": ids, "labels": ids}, bench.folder / "tensors.pt")
    flash = importlib.util.find_spec("flash_attn") is not None
    settings = {
        "tensors": str(bench.folder / "tensors.pt"), "model": str(folder), "method": "full", "lr": 1e-5, "stage": 2,
        "precision": "bf16", "steps": STEPS, "accumulate": GLOBAL // MICRO, "gradient_checkpointing": True,
        "attention": "flash_attention_2" if flash else "sdpa",
    }  # fmt: skip
    (bench.folder / "settings.json").write_text(json.dumps(settings))
    with tempfile.TemporaryDirectory() as store:
        env = os.environ | {
            "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "TMPDIR": store,
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()),
        }  # fmt: skip
        if bench.simulate:
            env["DS_ACCELERATOR"] = "cpu"
        command = [sys.executable, str(Path(__file__).with_name("handwritten.py")), str(bench.folder / "settings.json")]
        done = subprocess.run(command, capture_output=True, text=True, env=env)
    if done.returncode:
        bench.row(run="DeepSpeed loop 1.5B", failed=(done.stdout + done.stderr)[-1500:])
        return
    measured = json.loads(next(line for line in reversed(done.stdout.splitlines()) if line.startswith("{")))
    timed = measured["seconds"][UNTIMED:]
    rate = len(timed) * GLOBAL * length / sum(timed)
    bench.row(run="DeepSpeed loop 1.5B", tokens_per_second=rate, peak_gib=measured["peak_memory_gib"])


def free_port() -> int:
    from dstune.launch.commands import free_port

    return free_port()


@case
def trl_full_1_5b(bench: Bench) -> None:
    """Time TRL in fp32 weights and bf16 products, as SFTTrainer loads a model: dstune's have an fp32 copy too."""
    by_trl(bench, ONE_AND_A_HALF, "one-and-a-half", lora=False)


@case
def trl_lora_8b(bench: Bench) -> None:
    by_trl(bench, EIGHT, "eight", lora=True)


def by_trl(bench: Bench, shape: dict[str, int], name: str, *, lora: bool) -> None:
    """Time TRL's SFTTrainer on the same shape, rows and lengths: sdpa, and flash attention and Liger where installed."""
    if bench.simulate or importlib.util.find_spec("trl") is None:
        bench.row(run=f"TRL {name}", failed="not on a simulated device" if bench.simulate else "TRL is not installed")
        return
    folder = bench.shape(name, **shape)
    data = str(bench.long_rows(STEPS, GLOBAL))
    liger = importlib.util.find_spec("liger_kernel") is not None
    for kind in ["sdpa"] + ["flash_attention_2"] * (importlib.util.find_spec("flash_attn") is not None):
        title = f"TRL {name} {kind}{' Liger' if liger else ''}"
        bench.row(run=title, **train_by_trl(bench, folder, data, kind, liger=liger, lora=lora))


def train_by_trl(bench: Bench, folder: Path, data: str, kind: str, *, liger: bool, lora: bool) -> dict[str, Any]:
    import torch
    from datasets import load_dataset
    from peft import LoraConfig
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **keywords: Any) -> None:
            if "num_tokens" in logs:  # the loss was read: the device has come so far
                ends.append(time.perf_counter())

    dtype = torch.bfloat16 if lora else torch.float32
    with torch.device(bench.device):
        config = AutoConfig.from_pretrained(folder)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=kind)
    arguments = SFTConfig(
        output_dir=str(bench.folder / "trl"), max_steps=STEPS, per_device_train_batch_size=MICRO, packing=True,
        bf16=True, gradient_accumulation_steps=GLOBAL // MICRO, max_length=4096, gradient_checkpointing=True,
        logging_steps=1, save_strategy="no", report_to=[], use_liger_kernel=liger,
    )  # fmt: skip
    adapter = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM") if lora else None
    trainer = SFTTrainer(
        model,
        args=arguments,
        train_dataset=load_dataset("json", data_files=data, split="train"),
        processing_class=AutoTokenizer.from_pretrained(folder),
        peft_config=adapter,
        callbacks=[Clock()],
    )
    bench.accelerator.module().reset_peak_memory_stats()
    trainer.train()
    tokens = [row["num_tokens"] for row in trainer.state.log_history if "num_tokens" in row]
    peak = bench.accelerator.module().max_memory_allocated() / 2**30
    rate = (tokens[STEPS - 1] - tokens[UNTIMED - 1]) / (ends[STEPS - 1] - ends[UNTIMED - 1])
    del trainer, model
    torch.cuda.empty_cache()
    return {"tokens_per_second": rate, "peak_gib": peak}
