"""An export holds at most two files of weights in memory, whatever the size of the model."""

from __future__ import annotations

import math
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from dstune.checkpoint import store
from dstune.config.compose import compose
from dstune.config.run_file import write_run
from tests.support.tiny import save_decoder

SIZES = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 10, "vocab_size": 8000}
SHARD_MB = 40

# Everything is imported, and allocators are warm, before the level is taken.
PROGRAM = """
import sys
from pathlib import Path
import peft, torch
from dstune.checkpoint import card, export, model_folder
torch.set_num_threads(1)
run_dir, checkpoint, out, merge = Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4] == "merge"
print("ready", flush=True)
sys.stdin.readline()
export.export_checkpoint(run_dir, checkpoint, out, merge=merge, max_shard_size=sys.argv[5] + "MB")
"""


def anonymous_mb(pid: int) -> float:
    """Memory of a process that is not backed by a file: mapped checkpoints do not count, since they can be dropped."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) / 1024
    return 0.0


def peak_mb(run_dir: Path, out: Path, how: str) -> float:
    """The largest anonymous memory of an export above the level before it."""
    checkpoint = store.newest(run_dir)
    command = [sys.executable, "-c", PROGRAM, *map(str, (run_dir, checkpoint, out)), how, str(SHARD_MB)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin and process.stdout and process.stdout.readline() == "ready\n"
    before = peak = anonymous_mb(process.pid)
    process.stdin.write("go\n")
    process.stdin.close()
    while process.poll() is None:
        peak = max(peak, anonymous_mb(process.pid))
        time.sleep(0.002)
    assert process.returncode == 0
    return peak - before


def save_run(folder: Path, model: Path, weights: dict[str, torch.Tensor], *overrides: str) -> Path:
    """A run with one checkpoint of two ranks as DeepSpeed's stage 2 writes it."""
    write_run(
        folder / "run.yaml",
        compose([f"model.path={model}", "data=files", "data.train=x.jsonl", "task=chat", "zero=stage2", *overrides]),
    )
    written = store.folder(folder) / "step-00000001.incomplete"
    written.mkdir(parents=True)
    flat = torch.cat([weight.reshape(-1) for weight in weights.values()])
    half = math.ceil(len(flat) / 2)
    shapes = [{name: weight.shape for name, weight in weights.items()}]
    for rank, part in enumerate((flat[:half], flat[half:])):
        optimizer = {"single_partition_of_fp32_groups": [part.clone()], "base_optimizer_state": {"state": {}}}
        torch.save({"optimizer_state_dict": optimizer}, written / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    state = {"module": {}, "buffer_names": [], "param_shapes": shapes, "global_steps": 1}
    torch.save(state, written / "mp_rank_00_model_states.pt")
    store.commit(written, {"step": 1, "labels": [], "best": None})
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """47 million parameters, 181 MiB."""
    return save_decoder(tmp_path_factory.mktemp("memory") / "model", **SIZES)


@pytest.mark.parametrize("how", ["full", "merge"])
def test_an_export_needs_two_files_of_weights_in_memory(model, tmp_path, how):
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(model)
    weights, overrides = {name: weight.data for name, weight in base.named_parameters()}, ["method=full"]
    total = sum(weight.nbytes for weight in weights.values()) / 2**20
    assert total > 4 * SHARD_MB
    if how == "merge":
        weights, overrides = {}, ["method=lora", "method.rank=4", "method.target_modules=[q_proj]"]
        for layer in range(SIZES["num_hidden_layers"]):
            name = f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora"
            weights |= {
                f"{name}_A.default.weight": torch.randn(4, 512),
                f"{name}_B.default.weight": torch.randn(512, 4),
            }
    run_dir = save_run(tmp_path, model, weights, *overrides)
    peak = peak_mb(run_dir, tmp_path / "out", how)
    # A tensor is read before it joins its file; the rest is room for tokenizer, model objects and allocator.
    assert peak < 2 * SHARD_MB + 8 + 20, f"{peak:.0f} MB for a model of {total:.0f} MB"
    files = sorted((tmp_path / "out").glob("model-*.safetensors"))
    assert len(files) >= 5
    assert sum(weight.nbytes for file in files for weight in load_file(file).values()) == int(total * 2**20)
