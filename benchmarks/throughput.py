"""dstune against a hand-written DeepSpeed loop: useful tokens/s and peak memory, interleaved in one call.

    python benchmarks/throughput.py                  # SmolLM2, ZeRO-2, 2 ranks, 2 x 512 packed tokens a rank
    python benchmarks/throughput.py --precision bf16 --rounds 3 --methods full lora

Both sides train the same packed rows of the sample dialogues with torch's fused AdamW, all tokens counting in the loss.
dstune runs as a user runs it (`dstune train`: data path, logging, checks included); the rival has its tensors ready in
memory. The first two steps of each run are not counted. What counts is the ratio within a round; its median is reported.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

from dstune import samples
from dstune.config.compose import compose
from dstune.launch.commands import free_port

HERE = Path(__file__).parent
UNTIMED = 2
RANK = 8
LENGTH, ROWS = 512, 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--methods", nargs="+", choices=["full", "lora"], default=["full", "lora"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--stage", type=int, choices=[1, 2, 3], default=2)
    parser.add_argument("--length", type=int, default=LENGTH)
    parser.add_argument("--output", type=Path, help="write the table's numbers to this JSON file")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="dstune-benchmark-"))
    try:
        report = compare(options, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print_report(options, report)
    if options.output:
        options.output.write_text(json.dumps(report, indent=1))


def compare(options: argparse.Namespace, folder: Path) -> dict[str, list[dict[str, dict[str, float]]]]:
    samples.resolve("sample://smollm2")
    samples.resolve("sample://chitchat")
    tensors = ready_tensors(options, folder)
    report: dict[str, list[dict[str, dict[str, float]]]] = {method: [] for method in options.methods}
    for number in range(options.rounds):
        for method in options.methods:
            sides = [("handwritten", run_handwritten), ("dstune", run_dstune)]
            # Whoever goes second finds a warmer machine: the order changes every round.
            pair: dict[str, dict[str, float]] = {}
            for name, run in sides if number % 2 == 0 else reversed(sides):
                measured = pair[name] = run(options, folder, method, tensors)
                print(
                    f"round {number + 1} {method:5} {name:12} {measured['tokens_per_second']:8.1f} tokens/s "
                    f"{measured['peak_memory_gib']:.2f} GiB",
                    flush=True,
                )
            report[method].append(pair)
    return report


def overrides(options: argparse.Namespace, method: str) -> list[str]:
    return [
        "model=smollm2",
        "data=chitchat",
        f"data.max_length={options.length}",
        "data.split.validation=0",
        "task.train_on_prompt=true",
        f"method={method}",
        *([f"method.rank={RANK}", "method.alpha=16"] if method == "lora" else []),
        "schedule=constant",
        "optimizer.lr=1e-5",
        f"zero=stage{options.stage}",
        f"trainer.precision={options.precision}",
        f"trainer.micro_batch_size={ROWS}",
        f"trainer.global_batch_size={ROWS * options.ranks}",
        f"trainer.max_steps={options.steps}",
        "run.export=none",
        f"launch.processes={options.ranks}",
    ]


def ready_tensors(options: argparse.Namespace, folder: Path) -> dict[str, object]:
    """The very rows that dstune will train, as one file of tensors [steps, ranks, batch, sequence]."""
    import torch

    from dstune.data.build import prepare
    from dstune.data.collate import collate
    from dstune.data.sampler import share
    from dstune.models.load import load_tokenizer
    from dstune.paths import cache_root
    from dstune.rank_env import RankEnv
    from dstune.train.feed import training_order

    config = compose(overrides(options, "full")).config
    tokenizer = load_tokenizer(config.model)
    data = prepare(config, tokenizer, RankEnv(0, 1, 0, 1, "benchmark"), cache_root())
    order = training_order(config, data)
    steps, tokens = [], []
    for step in range(options.steps):
        window = order.window(*order.locate(step))
        tokens.append(window.tokens)
        ranks = []
        for rank in range(options.ranks):
            (micro_batch,) = share(window.micro_batches, rank, options.ranks)
            batch = collate(data.train, micro_batch, pad_token_id=tokenizer.pad_token_id, packing=True)
            # Both sides get rows of the same length; one that is a few tokens short is filled up with no targets.
            fill = {"input_ids": tokenizer.pad_token_id, "labels": -100, "position_ids": 0}
            short = options.length - batch["input_ids"].shape[1]
            ranks.append({k: torch.nn.functional.pad(v, (0, short), value=fill[k]) for k, v in batch.items()})
        steps.append(ranks)
    names = steps[0][0].keys()
    path = folder / "tensors.pt"
    torch.save({name: torch.stack([torch.stack([r[name] for r in ranks]) for ranks in steps]) for name in names}, path)
    return {"path": str(path), "tokens": tokens}


def run_handwritten(options: argparse.Namespace, folder: Path, method: str, tensors: dict) -> dict[str, float]:
    settings = {
        "tensors": tensors["path"],
        "model": str(samples.resolve("sample://smollm2", fetch=False)),
        "method": method,
        "rank": RANK,
        "lr": 1e-5,
        "stage": options.stage,
        "precision": options.precision,
        "steps": options.steps,
    }
    path = folder / "handwritten.json"
    path.write_text(json.dumps(settings))
    port = free_port()
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, len(os.sched_getaffinity(0)) // options.ranks))
    processes = []
    for rank in range(options.ranks):
        env = os.environ | {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(options.ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": threads,
            "HF_HUB_OFFLINE": "1",
        }
        command = [sys.executable, str(HERE / "handwritten.py"), str(path)]
        errors = (folder / f"handwritten-{rank}.log").open("w")
        processes.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=errors, text=True))
    outputs = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        raise SystemExit((folder / "handwritten-0.log").read_text()[-3000:])
    measured = json.loads(next(line for line in reversed(outputs[0].splitlines()) if line.startswith("{")))
    seconds = sum(measured["seconds"][UNTIMED:])
    return {
        "tokens_per_second": sum(tensors["tokens"][UNTIMED:]) / seconds,
        "peak_memory_gib": measured["peak_memory_gib"],
        "loss": measured["losses"][-1],
    }


def run_dstune(options: argparse.Namespace, folder: Path, method: str, tensors: dict) -> dict[str, float]:
    run_dir = folder / "run"
    shutil.rmtree(run_dir, ignore_errors=True)
    command = [sys.executable, "-m", "dstune", "train", *overrides(options, method), f"run.dir={run_dir}"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stdout[-3000:] + done.stderr[-3000:])
    result = json.loads((run_dir / "result.json").read_text())
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {
        "tokens_per_second": result["tokens_per_second"],
        "peak_memory_gib": result["peak_memory_gib"],
        "loss": [row["loss"] for row in rows if "loss" in row][-1],
    }


def median(rounds: list[dict[str, dict[str, float]]], side: str, key: str) -> float:
    return statistics.median(pair[side][key] for pair in rounds)


def print_report(options: argparse.Namespace, report: dict[str, list[dict[str, dict[str, float]]]]) -> None:
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "deepspeed", "transformers"))
    print(
        f"\n{platform.processor() or platform.machine()}, {os.cpu_count()} cores; {packages}; SmolLM2-135M, "
        f"ZeRO-{options.stage}, {options.precision}, {options.ranks} ranks, {ROWS} x {options.length} packed tokens a rank, "
        f"medians of {options.rounds}"
    )
    print(
        "| method | hand-written tokens/s | dstune tokens/s | ratio | hand-written GiB | dstune GiB |\n|---|---|---|---|---|---|"
    )
    for method, rounds in report.items():
        ratio = statistics.median(
            pair["dstune"]["tokens_per_second"] / pair["handwritten"]["tokens_per_second"] for pair in rounds
        )
        speed = [median(rounds, side, "tokens_per_second") for side in ("handwritten", "dstune")]
        memory = [median(rounds, side, "peak_memory_gib") for side in ("handwritten", "dstune")]
        print(f"| {method} | {speed[0]:.1f} | {speed[1]:.1f} | {ratio:.3f} | {memory[0]:.2f} | {memory[1]:.2f} |")


if __name__ == "__main__":
    main()
