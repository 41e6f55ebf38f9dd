"""The planner's memory against the peak that ranks reach: random models of tens of millions of weights, three steps each.

    python benchmarks/plan_accuracy.py --results runs/plan_accuracy.json      # resumable: cases that are there are kept
    python benchmarks/plan_accuracy.py --results runs/plan_accuracy.json --only qwen3_stage2 --rerun
    python benchmarks/plan_accuracy.py --results runs/plan_accuracy.json --report --plot docs/images/plan_accuracy.svg

Each case is a run of `dstune train` on two CPU ranks over gloo (`result.json`'s `peak_memory_gib`: anonymous and shared
resident memory above the level after imports, the largest of any rank). The prediction is made anew at every report.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from dstune.config.compose import compose
from dstune.launch.plan import planned
from dstune.planning.hardware import DEVICES, Cluster
from dstune.planning.plan import CPU_CAUTION

WORDS = [f"w{number}" for number in range(96)]
SPECIAL = ["<unk>", "<s>", "</s>"]
STEPS = 3

COMMON = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2, "max_position_embeddings": 4096}
LLAMA = COMMON | {
    "model_type": "llama",
    "vocab_size": 49152,
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_hidden_layers": 8,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}
QWEN3 = COMMON | {
    "model_type": "qwen3",
    "vocab_size": 151936,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "tie_word_embeddings": True,
}
EXPERTS = LLAMA | {
    "model_type": "qwen3_moe",
    "head_dim": 64,
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 256,
    "decoder_sparse_step": 1,
}
GEMMA3 = COMMON | {
    "model_type": "gemma3_text",
    "vocab_size": 256000,
    "hidden_size": 160,
    "intermediate_size": 640,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "sliding_window": 512,
    "tie_word_embeddings": True,
}
BERT = {
    "model_type": "bert",
    "vocab_size": 30522,
    "hidden_size": 384,
    "intermediate_size": 1536,
    "num_hidden_layers": 8,
    "num_attention_heads": 6,
    "pad_token_id": 2,
}


@dataclass(frozen=True)
class Case:
    config: dict[str, Any]
    stage: int
    precision: str
    micro_batch: int
    length: int
    more: tuple[str, ...] = ()
    ranks: int = 2

    def overrides(self, folder: Path, data: Path) -> list[str]:
        classifier = self.config["model_type"] == "bert"
        return [
            f"model.path={folder}",
            "model.weights=random",
            "data=files",
            f"data.train={data}",
            f"task={'classification' if classifier else 'causal_lm'}",
            f"data.packing={str(not classifier).lower()}",
            f"data.max_length={self.length}",
            f"zero=stage{self.stage}",
            f"trainer.precision={self.precision}",
            f"trainer.micro_batch_size={self.micro_batch}",
            f"trainer.global_batch_size={self.micro_batch * self.ranks}",
            f"trainer.max_steps={STEPS}",
            f"launch.processes={self.ranks}",
            "evaluate.at_start=false",
            "run.export=none",
            *self.more,
        ]


CHECKPOINTING = "trainer.activation_checkpointing=true"
LORA = ("method=lora", "method.rank=16")
CASES = {
    "llama_stage0_fp32": Case(LLAMA, 0, "fp32", 2, 512),
    "llama_stage1": Case(LLAMA, 1, "bf16", 2, 512),
    "llama_stage2": Case(LLAMA, 2, "bf16", 2, 512),
    "llama_stage3": Case(LLAMA, 3, "bf16", 2, 512),
    "llama_stage2_fp32": Case(LLAMA, 2, "fp32", 2, 512),
    "llama_stage3_fp32": Case(LLAMA, 3, "fp32", 2, 256),
    "llama_stage2_long": Case(LLAMA, 2, "bf16", 1, 2048),
    "llama_stage2_checkpointing": Case(LLAMA, 2, "bf16", 2, 1024, (CHECKPOINTING,)),
    "llama_stage3_checkpointing_fp32": Case(LLAMA, 3, "fp32", 1, 1024, (CHECKPOINTING,)),
    "llama_lora_stage2": Case(LLAMA, 2, "bf16", 2, 512, LORA),
    "llama_lora_stage3_checkpointing": Case(LLAMA, 3, "bf16", 2, 512, (*LORA, CHECKPOINTING)),
    "llama_stage2_accumulated": Case(LLAMA, 2, "bf16", 1, 512, ("trainer.global_batch_size=6",)),
    "qwen3_stage2": Case(QWEN3, 2, "bf16", 2, 256),
    "qwen3_stage3_fp32": Case(QWEN3, 3, "fp32", 1, 256),
    "experts_stage2_fp32": Case(EXPERTS, 2, "fp32", 2, 512),
    "experts_stage3_checkpointing_fp32": Case(EXPERTS, 3, "fp32", 2, 512, (CHECKPOINTING,)),
    "experts_lora_stage2_fp32": Case(EXPERTS, 2, "fp32", 2, 512, LORA),
    "experts_lora_stage3_fp32": Case(EXPERTS, 3, "fp32", 2, 512, LORA),
    "gemma3_stage2": Case(GEMMA3, 2, "bf16", 1, 256),
    "gemma3_lora_stage3": Case(GEMMA3, 3, "bf16", 1, 512, LORA),
    "bert_stage2_fp32": Case(BERT, 2, "fp32", 16, 128),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, required=True, help="measured peaks, read and written")
    parser.add_argument("--only", nargs="+", choices=list(CASES))
    parser.add_argument("--rerun", action="store_true", help="measure again what is there")
    parser.add_argument("--report", action="store_true", help="measure nothing")
    parser.add_argument("--plot", type=Path, help="write the plot to this SVG file")
    options = parser.parse_args()
    measured = json.loads(options.results.read_text()) if options.results.is_file() else {}
    with tempfile.TemporaryDirectory(prefix="dstune-benchmark-") as scratch:
        for name in () if options.report else options.only or CASES:
            if name in measured and not options.rerun:
                continue
            measured[name] = measure(name, Path(scratch) / name)
            options.results.parent.mkdir(parents=True, exist_ok=True)
            options.results.write_text(json.dumps(measured, indent=1))
            print(name, measured[name], flush=True)
        rows = [(name, predict(name, Path(scratch)), measured[name]["gib"]) for name in CASES if name in measured]
    report(rows)
    if options.plot:
        options.plot.parent.mkdir(parents=True, exist_ok=True)
        options.plot.write_text(plot(rows))


def write_model(folder: Path, config: dict[str, Any]) -> None:
    """Write `config.json` and a word-level tokenizer: all that `model.weights=random` needs."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    words = {token: index for index, token in enumerate(SPECIAL + WORDS)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    wrapped.save_pretrained(folder)


def write_rows(path: Path, case: Case) -> None:
    """Write twice as many full rows as the run reads."""
    choose = random.Random(0)
    rows = 2 * STEPS * 8 * case.micro_batch
    with path.open("w") as stream:
        for number in range(rows):
            row: dict[str, Any] = {"text": " ".join(choose.choices(WORDS, k=case.length + 1))}
            if case.config["model_type"] == "bert":
                row["label"] = ["left", "right"][number % 2]
            stream.write(json.dumps(row) + "\n")


def measure(name: str, folder: Path) -> dict[str, Any]:
    case = CASES[name]
    write_model(folder / "model", case.config)
    write_rows(folder / "rows.jsonl", case)
    command = [sys.executable, "-m", "dstune", "train", *case.overrides(folder / "model", folder / "rows.jsonl")]
    env = os.environ | {"DSTUNE_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    log = subprocess.run([*command, f"run.dir={folder / 'run'}"], env=env, capture_output=True, text=True)
    if log.returncode:
        raise SystemExit(f"{name}: exit {log.returncode}\n{log.stdout[-2000:]}\n{log.stderr[-2000:]}")
    result = json.loads((folder / "run" / "result.json").read_text())
    steps = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    seconds = [row["step_seconds"] for row in steps if "step_seconds" in row]
    return {"gib": result["peak_memory_gib"], "step_seconds": seconds[-1]}


def predict(name: str, scratch: Path) -> float:
    """Return the GiB of a rank, by the planner on as many CPU ranks."""
    case = CASES[name]
    folder = scratch / f"{name}-plan"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(case.config))
    config = compose(case.overrides(folder, folder / "rows.jsonl")).config
    device = replace(DEVICES["CPU"], memory_gib=64.0)
    return planned(config, Cluster(device, case.ranks)).plan.configured.memory_gib


def report(rows: list[tuple[str, float, float]]) -> None:
    print(
        f"{os.cpu_count()} cores, Python {platform.python_version()}, torch {version('torch')}, DeepSpeed "
        f"{version('deepspeed')}, transformers {version('transformers')}, {STEPS} steps, 2 ranks"
    )
    print("| case | predicted GiB | measured GiB | error |\n| --- | --- | --- | --- |")
    errors = []
    for name, predicted, actual in rows:
        errors.append(predicted / actual - 1)
        print(f"| {name} | {predicted:.3f} | {actual:.3f} | {errors[-1]:+.1%} |")
    if errors:
        sizes = [abs(error) for error in errors]
        wrong = [name for name, predicted, actual in rows if predicted * CPU_CAUTION < actual]
        print(
            f"mean error {sum(sizes) / len(sizes):.1%}, worst {max(sizes):.1%}, false fits: {', '.join(wrong) or 'none'}"
        )


def plot(rows: list[tuple[str, float, float]]) -> str:
    """Plot predicted against measured, both axes in GiB, with the diagonal and 10% beside it."""
    size, edge = 360, 44
    most = 1.1 * max(max(predicted, actual) for _, predicted, actual in rows)

    def at(value: float) -> float:
        return edge + value / most * (size - 2 * edge)

    def line(factor: float, dash: str) -> str:
        end = min(most, most / factor)
        return (
            f'<line x1="{at(0):.1f}" y1="{size - at(0):.1f}" x2="{at(end):.1f}" y2="{size - at(end * factor):.1f}" '
            f'stroke="#888" stroke-dasharray="{dash}"/>'
        )

    marks = [
        f'<circle cx="{at(actual):.1f}" cy="{size - at(predicted):.1f}" r="4" fill="#1f6feb" fill-opacity="0.7">'
        f"<title>{name}: predicted {predicted:.3f}, measured {actual:.3f} GiB</title></circle>"
        for name, predicted, actual in rows
    ]
    ticks = []
    for number in range(int(most / 0.5) + 1):
        value = number * 0.5
        ticks.append(f'<text x="{at(value):.1f}" y="{size - edge + 16}" text-anchor="middle">{value:g}</text>')
        ticks.append(f'<text x="{edge - 6}" y="{size - at(value) + 4:.1f}" text-anchor="end">{value:g}</text>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size} {size}" font-family="sans-serif" font-size="11">'
        f'<rect width="{size}" height="{size}" fill="#fff"/>'
        f"{line(1.0, 'none')}{line(1.1, '4 3')}{line(0.9, '4 3')}{''.join(marks)}{''.join(ticks)}"
        f'<text x="{size / 2}" y="{size - 8}" text-anchor="middle">measured GiB of a rank (lines: equal, 10% apart)</text>'
        f'<text x="12" y="{size / 2}" text-anchor="middle" transform="rotate(-90 12 {size / 2})">predicted GiB</text>'
        "</svg>\n"
    )


if __name__ == "__main__":
    main()
