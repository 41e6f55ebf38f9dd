"""Memory of a rank while a large model is loaded: at most its share of the weights and one file of them at ZeRO-3.

    python benchmarks/loading.py
    python benchmarks/loading.py --ranks 4 --stages 3 --precision fp32

A Qwen 2.5 of 1.5 billion random weights in bf16, saved in files of 500 MB, is loaded as `dstune train` loads it, by all ranks at
once. The peak is anonymous and shared resident memory above the level after the imports, the largest of any rank.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from contenders import free_port

from dstune.config.compose import compose
from dstune.config.schema import Precision

OVERRIDES = ["task=causal_lm", "data=files", "data.train=nothing.jsonl", "data.packing=false"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--stages", type=int, nargs="+", default=[3, 2])
    parser.add_argument("--precision", choices=["bf16", "fp32"], default="bf16", help="fp32: weights are converted")
    parser.add_argument("--folder", type=Path, help="where the model is made, or is already; 3.1 GB")
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank:
        load(options.folder, options.stages[0], Precision[options.precision])
        return
    with tempfile.TemporaryDirectory(prefix="dstune-loading-", dir=options.folder and options.folder.parent) as scratch:
        folder = options.folder or Path(scratch) / "model"
        make(folder)
        files = [file.stat().st_size for file in folder.glob("*.safetensors")]
        whole, file = sum(files) / 2**30, max(files) / 2**30
        print(f"{whole:.2f} GiB of weights in {len(files)} files of {file:.2f} GiB at most, {options.ranks} ranks")
        print("| ZeRO | peak GiB a rank | of it share and one file | afterwards | s |\n| --- | --- | --- | --- | --- |")
        for stage in options.stages:
            ranks = run(folder, stage, options.precision, options.ranks)
            size = whole * (2 if options.precision == "fp32" else 1)
            share = size / options.ranks if stage == 3 else size
            print(
                f"| {stage} | {max(rank['peak'] for rank in ranks):.2f} | {share + file:.2f} "
                f"| {max(rank['after'] for rank in ranks):.2f} | {max(rank['seconds'] for rank in ranks):.1f} |",
                flush=True,
            )


def make(folder: Path) -> None:
    if (folder / "config.json").is_file():
        return
    from plan_accuracy import write_model
    from transformers import Qwen2Config, Qwen2ForCausalLM

    write_model(folder, {})

    shape = {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12}
    config = Qwen2Config(vocab_size=151936, num_key_value_heads=2, tie_word_embeddings=True, **shape)
    torch.set_default_dtype(torch.bfloat16)
    Qwen2ForCausalLM(config).save_pretrained(folder, max_shard_size="500MB")
    torch.set_default_dtype(torch.float32)


def run(folder: Path, stage: int, precision: str, ranks: int) -> list[dict[str, float]]:
    command = [sys.executable, __file__, "--rank", "--folder", str(folder), "--stages", str(stage)]
    command += ["--precision", precision]
    common = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1"}
    common |= {"MASTER_PORT": str(free_port()), "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(
            command,
            env=os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for rank in range(ranks)
    ]
    outputs = [process.communicate()[0] for process in started]
    assert not any(process.returncode for process in started), "a rank failed"
    return [json.loads(output.splitlines()[-1]) for output in outputs]


def load(folder: Path, stage: int, precision: Precision) -> None:
    from dstune.core.rank_env import from_environment
    from dstune.models.load import load_model, load_tokenizer
    from dstune.trainer.memory import PeakMemory
    from dstune.zero.ds_config import deepspeed_config
    from dstune.zero.parts import partitioned_loading
    from dstune.zero.precision import DTYPES
    from dstune.zero.start import start_process_group

    env = from_environment(os.environ)
    assert env is not None
    world = start_process_group(env)
    config = compose(
        [*OVERRIDES, f"model.path={folder}", f"zero.stage={stage}", f"trainer.precision={precision.name}"]
    ).config
    tokenizer = load_tokenizer(config.model)
    settings = deepspeed_config(config, world.size, precision, on_gpu=torch.cuda.is_available())
    memory = PeakMemory()
    began = time.perf_counter()
    with partitioned_loading(settings):
        model = load_model(config, tokenizer, (), DTYPES[precision])
    seconds = time.perf_counter() - began
    peak, after = memory.gib, memory.now_gib
    memory.close()
    world.barrier()
    print(json.dumps({"peak": peak, "after": after, "seconds": seconds, "weights": len(list(model.parameters()))}))
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
