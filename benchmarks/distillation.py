"""Distillation: memory beside complete logits, and a student beside the same one that learned from texts alone.

usage: python benchmarks/distillation.py memory [--targets 2048] [--vocabularies N ...] [--teacher-hidden 2048] [--json]
       python benchmarks/distillation.py student FOLDER [--layers 10] [--steps 60] [--seeds 3] [--rows 800] [--json]
       python benchmarks/distillation.py recipe FOLDER [--steps 40] [--seeds 3] [--json]

memory: the peak of a process (VmHWM, above what it had before) for the loss and its gradients, by vocabulary: chunk by chunk from
hidden states, and by autograd on complete logits. One thread, fp32, on the CPU.

student: SmolLM2-135M is fine-tuned on dialogues and cut to some of its layers (`dstune prune`). The cut model is trained on these
rows once by `task=chat`, and with the fine-tuned model as its teacher by `task=distillation`, on the rows and with half of the
steps on its own answers: as many steps, the same rate. Reported are the cross entropies of held-out dialogues.

recipe: `experiment=smollm2_compressed` for some of its steps: size, and cross entropy of its held-out dialogues, of the complete
model, of the pruned one, and of that after training.

FOLDER keeps the runs: a repeated command goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scipy import stats

VOCABULARIES = (32_000, 49_152, 128_256, 152_064)
STUDENT = 576
"""Its hidden size."""
BETA = 0.5

PROGRAM = """
import sys
from pathlib import Path
import torch
from torch import nn
from torch.nn import functional
from dstune.models.divergence import BlockDivergence, Objective, projected_divergence
from dstune.models.logit_transform import LogitTransform
from dstune.models.cross_entropy import chunk_rows
from dstune.tasks.distillation.teacher import ChunkedLogits

way, vocabulary, targets, student, teacher, beta = sys.argv[1], *map(int, sys.argv[2:6]), float(sys.argv[6])
torch.set_num_threads(1)

def highest():
    return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line)

own = nn.Linear(student, vocabulary, bias=False)
theirs = nn.Linear(teacher, vocabulary, bias=False).requires_grad_(False)
hidden, states = torch.randn(targets, student, requires_grad=True), torch.randn(targets, teacher)
expected = torch.randint(vocabulary, (targets,))

def loss(hidden, states, expected):
    if way == "chunks":
        taught = ChunkedLogits(states, theirs, LogitTransform(), chunk_rows(states, vocabulary))
        block_loss = BlockDivergence(Objective(beta, 1.0), LogitTransform(), taught, expected)
        return projected_divergence(own, own.forward, hidden, block_loss)
    s, t = functional.log_softmax(own(hidden), -1), functional.log_softmax(theirs(states), -1)
    m = torch.logaddexp(t + torch.tensor(beta).log(), s + torch.tensor(1 - beta).log())
    kl = functional.kl_div
    return beta * kl(m, t, reduction="sum", log_target=True) + (1 - beta) * kl(m, s, reduction="sum", log_target=True)

loss(hidden[:4], states[:4], expected[:4]).backward()
before = highest()
value = loss(hidden, states, expected)
value.backward()
print(highest() - before, float(value.detach()) / targets)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    memory = commands.add_parser("memory")
    memory.add_argument("--targets", type=int, default=2048)
    memory.add_argument("--vocabularies", type=int, nargs="+", default=VOCABULARIES)
    memory.add_argument("--teacher-hidden", type=int, default=2048)
    student, recipe = commands.add_parser("student"), commands.add_parser("recipe")
    for command, steps in ((student, 60), (recipe, 40)):
        command.add_argument("folder", type=Path)
        command.add_argument("--layers", type=int, default=10)
        command.add_argument("--steps", type=int, default=steps)
        command.add_argument("--seeds", type=int, default=3)
    student.add_argument("--rows", type=int, default=800)
    for command in (memory, student, recipe):
        command.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    result = {"memory": measure_memory, "student": train_students, "recipe": train_recipe}[arguments.command](arguments)
    if arguments.json:
        print(json.dumps({"machine": platform.processor() or platform.machine(), **result}))
        return
    for row in result["rows"]:
        print("  ".join(f"{name} {value}" for name, value in row.items()), flush=True)


def measure_memory(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure peaks in MiB by vocabulary."""
    rows = []
    for vocabulary in arguments.vocabularies:
        row: dict[str, Any] = {"vocabulary": vocabulary}
        for way in ("chunks", "logits"):
            sizes = (vocabulary, arguments.targets, STUDENT, arguments.teacher_hidden)
            words = [way, *map(str, sizes), str(BETA)]
            done = subprocess.run([sys.executable, "-c", PROGRAM, *words], capture_output=True, text=True, check=False)
            if done.returncode:
                row[f"{way}_mib"] = "out of memory" if done.returncode < 0 else done.stderr.splitlines()[-1]
                continue
            kib, value = done.stdout.split()[-2:]
            row |= {f"{way}_mib": round(int(kib) / 1024), f"{way}_loss": round(float(value), 6)}
        rows.append(row)
    return {"targets": arguments.targets, "rows": rows}


def train_students(arguments: argparse.Namespace) -> dict[str, Any]:
    """Train students; return held-out cross entropies by seed."""
    folder: Path = arguments.folder
    folder.mkdir(parents=True, exist_ok=True)
    common = [
        "data=chitchat",
        f"data.max_rows={arguments.rows}",
        "data.max_length=128",
        "data.split.validation=0.1",
        "method=full",
        "zero=stage2",
        "trainer.precision=fp32",
        "trainer.micro_batch_size=4",
        "trainer.global_batch_size=4",
        "launch.processes=1",
        "evaluate.samples=0",
        "evaluate.max_rows=64",
        "evaluate.every=0",
        "checkpoint.every=0",
    ]
    steps = f"trainer.max_steps={arguments.steps}"
    teacher = folder / "teacher"
    run("train", *common, "model=smollm2", "task=chat", "optimizer.lr=5e-5", steps, f"run.dir={teacher}")
    student = folder / f"student-{arguments.layers}"
    if not student.exists():
        run("prune", str(teacher / "export"), "--layers", str(arguments.layers), "--output", str(student))
    rows = [{"seed": "", "model": "teacher", "text_loss": final(teacher)["loss"]}]
    for seed in range(arguments.seeds):
        overrides = [
            *common,
            steps,
            f"trainer.seed={seed}",
            f"model.path={student}",
            "optimizer.lr=3e-4",
            "run.export=none",
        ]
        texts, taught = folder / f"texts-{seed}", folder / f"taught-{seed}"
        run("train", *overrides, "task=chat", f"run.dir={texts}", "evaluate.at_start=true")
        keys = [f"task.teacher={teacher}", "task.beta=0", "task.text_weight=0.3"]
        run("train", *overrides, "task=distillation", *keys, f"run.dir={taught}")
        answering = folder / f"answering-{seed}"
        keys = [f"task.teacher={teacher}", "task.beta=0", "task.on_policy=0.5", "task.max_new_tokens=32"]
        run("train", *overrides, "task=distillation", *keys, f"run.dir={answering}")
        losses = {
            "texts alone": final(texts)["loss"],
            "taught": final(taught)["text_loss"],
            "taught, half of the steps on own answers": final(answering)["text_loss"],
        }
        rows += [{"seed": seed, "model": model, "text_loss": loss} for model, loss in losses.items()]
        print(losses, file=sys.stderr, flush=True)
    return {"steps": arguments.steps, "layers": arguments.layers, "rows": rows + gains(rows)}


def train_recipe(arguments: argparse.Namespace) -> dict[str, Any]:
    """Prune and train as the packaged experiment does; return sizes and held-out cross entropies by seed."""
    folder: Path = arguments.folder
    folder.mkdir(parents=True, exist_ok=True)
    pruned = folder / "pruned"
    if not pruned.exists():
        run("prune", "sample://smollm2", "--layers", str(arguments.layers), "--output", str(pruned))
    rows: list[dict[str, Any]] = []
    for seed in range(arguments.seeds):
        directory = folder / f"seed-{seed}"
        keys = [
            f"trainer.max_steps={arguments.steps}",
            "run.export=last",
            "evaluate.every=0",
            "evaluate.at_start=true",
            "checkpoint.every=0",
        ]
        words = ["experiment=smollm2_compressed", f"model.path={pruned}", "launch.processes=1", f"trainer.seed={seed}"]
        run("train", *words, *keys, f"run.dir={directory}")
        before, after = (
            json.loads((directory / "result.json").read_text())[f"eval_{end}"] for end in ("initial", "final")
        )
        if not rows:
            rows = [
                {"seed": "", "model": "complete", "text_loss": before["teacher_text_loss"]},
                {"seed": "", "model": "pruned", "mib": mib(pruned), "text_loss": before["text_loss"]},
            ]
        rows.append(
            {"seed": seed, "model": "trained", "mib": mib(directory / "export"), "text_loss": after["text_loss"]}
        )
    losses = [row["text_loss"] for row in rows if row["model"] == "trained"]
    half = half_interval(losses) if len(losses) > 1 else float("nan")
    rows.append({"model": "trained, mean", "text_loss": statistics.mean(losses), "95% interval": f"+-{half:.4f}"})
    return {"steps": arguments.steps, "layers": arguments.layers, "rows": rows}


def mib(folder: Path) -> int:
    return round(sum(path.stat().st_size for path in folder.glob("*.safetensors")) / 2**20)


def half_interval(values: Sequence[float]) -> float:
    """Half of the 95% interval of their mean, by Student's t."""
    return float(stats.t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5)


def gains(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """How much lower than that of texts alone each loss is: the mean over seeds with its 95% interval (Student's t)."""
    by_model: dict[str, list[float]] = {}
    for row in rows:
        by_model.setdefault(row["model"], []).append(row["text_loss"])
    alone = by_model["texts alone"]
    lower = []
    for model, losses in by_model.items():
        if len(losses) != len(alone) or len(alone) < 2 or model == "texts alone":
            continue
        differences = [before - after for before, after in zip(alone, losses, strict=True)]
        mean, half = statistics.mean(differences), half_interval(differences)
        lower.append({"model": model, "lower by": round(mean, 4), "95% interval": f"+-{half:.4f}"})
    return lower


def run(*words: str) -> None:
    environment = {**os.environ, "WANDB_MODE": "offline", "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-m", "dstune", *words], check=True, env=environment, stdout=subprocess.DEVNULL)


def final(folder: Path) -> dict[str, float]:
    return json.loads((folder / "result.json").read_text())["eval_final"]


if __name__ == "__main__":
    main()
