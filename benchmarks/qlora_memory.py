"""Memory and speed of `method=qlora` beside `method=lora`: the same rows, rank and steps, each as a user runs it.

    python benchmarks/qlora_memory.py                       # a random model of 0.5 billion parameters, fp32
    python benchmarks/qlora_memory.py --precision bf16

The model is Llama's architecture with the sample's tokenizer, drawn from a seed and saved in bf16: memory does not ask what
the weights are. (Weights that are computed in the format of their file stay mapped to it on a CPU, and are not counted: the
sample, in fp32, would look as if it took nothing.) One rank, ZeRO-2, one row of 64 tokens a step, activations checkpointed,
so that weights are what is measured. `peak_memory_gib` is that of `result.json`: resident memory above the level after
imports, the loading of the model included.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from dstune import samples

LARGE = {"hidden_size": 1536, "intermediate_size": 4096, "num_hidden_layers": 16, "num_attention_heads": 24}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=["smollm2", "large"], default=["large"])
    parser.add_argument("--methods", nargs="+", default=["lora", "qlora", "qlora method.double_quantization=false"])
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--steps", type=int, default=4)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="dstune-benchmark-"))
    print("| model | method | peak GiB | tokens/s | loss of the last step |\n| --- | --- | --- | --- | --- |")
    try:
        for model in options.models:
            path = "sample://smollm2" if model == "smollm2" else str(save_large(folder / "large"))
            for number, method in enumerate(options.methods):
                result = measure(path, method, folder / f"{model}-{number}", options)
                print(
                    f"| {model} | {method} | {result['peak_memory_gib']:.2f} | {result['tokens_per_second']:.0f} "
                    f"| {result['loss']:.3f} |",
                    flush=True,
                )
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def save_large(folder: Path) -> Path:
    """Write the architecture as a folder, in a process of its own, so that this one stays small."""
    program = (
        "import sys, json, torch, transformers\n"
        "source, target, changes = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])\n"
        "torch.manual_seed(0)\n"
        "tokenizer = transformers.AutoTokenizer.from_pretrained(source)\n"
        "config = transformers.LlamaConfig(vocab_size=len(tokenizer), tie_word_embeddings=True, **changes)\n"
        "transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(target)\n"
        "tokenizer.save_pretrained(target)\n"
    )
    source = str(samples.resolve("sample://smollm2"))
    changes = json.dumps(LARGE | {"num_key_value_heads": 24, "max_position_embeddings": 1024})
    subprocess.run([sys.executable, "-c", program, source, str(folder), changes], check=True)
    return folder


def measure(model: str, method: str, run_dir: Path, options: argparse.Namespace) -> dict[str, float]:
    command = [
        *(sys.executable, "-m", "dstune", "train", f"model.path={model}", "data=chitchat", f"run.dir={run_dir}"),
        *("method=" + method).split(),
        *("method.rank=8", "zero=stage2", "launch.processes=1", f"trainer.precision={options.precision}"),
        *("data.max_rows=200", "data.max_length=64", "trainer.micro_batch_size=1", "trainer.global_batch_size=1"),
        *(f"trainer.max_steps={options.steps}", "trainer.activation_checkpointing=true", "evaluate.at_start=false"),
        *("data.split.validation=0", "run.export=none", "optimizer.lr=1e-4"),
    ]
    done = subprocess.run(command, env={**os.environ, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    result = json.loads((run_dir / "result.json").read_text())
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    result["loss"] = [row["loss"] for row in rows if "loss" in row][-1]
    return dict(result)


if __name__ == "__main__":
    main()
