"""What `throughput.py` and `compare.py` share: the rows that all sides train, and how each side is run and timed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dstune import samples
from dstune.config.compose import compose
from dstune.launch.commands import free_port

HERE = Path(__file__).parent
LORA_RANK, LORA_ALPHA = 8, 16


@dataclass(frozen=True)
class Job:
    """One training job, the same for every side."""

    method: str = "full"
    """`full` or `lora`."""
    targets: str = "all"
    """Tokens that count in the loss: `all`, or those of the `assistant` alone."""
    stage: int = 2
    precision: str = "bf16"
    ranks: int = 2
    length: int = 512
    rows: int = 2
    """Packed rows of a rank in a step."""
    steps: int = 5

    @property
    def lr(self) -> float:
        return 2e-4 if self.method == "lora" else 1e-5

    def overrides(self) -> list[str]:
        lora = [f"method.rank={LORA_RANK}", f"method.alpha={LORA_ALPHA}"] if self.method == "lora" else []
        return [
            "model=smollm2",
            "data=chitchat",
            f"data.max_length={self.length}",
            "data.split.validation=0",
            f"task.train_on_prompt={str(self.targets == 'all').lower()}",
            f"method={self.method}",
            *lora,
            "schedule=constant",
            f"optimizer.lr={self.lr}",
            f"zero=stage{self.stage}",
            f"trainer.precision={self.precision}",
            f"trainer.micro_batch_size={self.rows}",
            f"trainer.global_batch_size={self.rows * self.ranks}",
            f"trainer.max_steps={self.steps}",
            "run.export=none",
            f"launch.processes={self.ranks}",
        ]

    def settings(self, tensors: Path) -> dict[str, Any]:
        """Return the job for the scripts of the other sides."""
        return {
            "tensors": str(tensors),
            "model": str(samples.resolve("sample://smollm2", fetch=False)),
            "method": self.method,
            "rank": LORA_RANK,
            "alpha": LORA_ALPHA,
            "lr": self.lr,
            "stage": self.stage,
            "precision": self.precision,
            "steps": self.steps,
        }


@dataclass(frozen=True)
class Measured:
    """What came of one run of one side."""

    seconds: list[float]
    """Of each step."""
    losses: list[float]
    peak_memory_gib: float
    """The larger of the ranks."""
    first_step_seconds: float
    """From the start of the command to the end of the first step."""


class Failed(Exception):
    """A side could not run the job; the message is the end of what it printed."""


def write_tensors(job: Job, path: Path) -> list[int]:
    """Write the very rows that dstune will train, as one file of tensors [steps, ranks, batch, sequence]; returns how many
    tokens, padding left out, each step has."""
    import torch

    from dstune.core.paths import cache_root
    from dstune.core.rank_env import RankEnv
    from dstune.data.build import prepare
    from dstune.data.collate import collate
    from dstune.data.sampler import share
    from dstune.models.load import load_tokenizer
    from dstune.trainer.data_loader import order_of

    config = compose(job.overrides()).config
    tokenizer = load_tokenizer(config.model)
    data = prepare(config, tokenizer, RankEnv(0, 1, 0, 1, "benchmark"), cache_root())
    order = order_of(config, data.train)
    steps, tokens = [], []
    for step in range(job.steps):
        global_batch = order.global_batch(*order.locate(step))
        tokens.append(global_batch.tokens)
        ranks = []
        for rank in range(job.ranks):
            (micro_batch,) = share(global_batch.micro_batches, rank, job.ranks)
            batch = collate(data.train, micro_batch, pad_token_id=tokenizer.pad_token_id, packing=True)
            # All sides get rows of the same length; one that is a few tokens short is filled up with no targets.
            fill = {"input_ids": tokenizer.pad_token_id, "labels": -100, "position_ids": 0}
            short = job.length - batch["input_ids"].shape[1]
            ranks.append({k: torch.nn.functional.pad(v, (0, short), value=fill[k]) for k, v in batch.items()})
        steps.append(ranks)
    names = steps[0][0].keys()
    torch.save({name: torch.stack([torch.stack([r[name] for r in ranks]) for ranks in steps]) for name in names}, path)
    return tokens


def run_script(
    script: str, arguments: list[str], job: Job, tensors: Path, folder: Path, further: dict[str, Any] | None = None
) -> Measured:
    """Run `script SETTINGS ARGUMENTS` on every rank, with the environment that dstune gives its ranks. further: settings of the
    script's own."""
    path = folder / "settings.json"
    path.write_text(json.dumps(job.settings(tensors) | (further or {})))
    port = free_port()
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, len(os.sched_getaffinity(0)) // job.ranks))
    began = time.time()
    processes = []
    for rank in range(job.ranks):
        env = os.environ | {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(job.ranks),
            "LOCAL_WORLD_SIZE": str(job.ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "GLOO_SOCKET_IFNAME": "lo",
            "OMP_NUM_THREADS": threads,
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        command = [sys.executable, str(HERE / script), str(path), *arguments]
        with (folder / f"rank-{rank}.log").open("w") as errors:
            processes.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=errors, text=True))
    outputs = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        raise Failed("\n".join((folder / f"rank-{rank}.log").read_text()[-1500:] for rank in range(job.ranks)))
    ranks = [
        json.loads(next(line for line in reversed(output.splitlines()) if line.startswith("{"))) for output in outputs
    ]
    return Measured(
        seconds=ranks[0]["seconds"],
        losses=ranks[0]["losses"],
        peak_memory_gib=max(rank["peak_memory_gib"] for rank in ranks),
        first_step_seconds=ranks[0]["first_step_ended"] - began,
    )


def run_dstune(job: Job, folder: Path, overrides: tuple[str, ...] = ()) -> Measured:
    """Run `dstune train`, as a user runs it: data path, logging, checks and final save included."""
    run_dir = folder / "run"
    shutil.rmtree(run_dir, ignore_errors=True)
    command = [sys.executable, "-m", "dstune", "train", *job.overrides(), *overrides, f"run.dir={run_dir}"]
    began = time.time()
    with (folder / "dstune.log").open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    first = None
    while process.poll() is None:
        if first is None and (run_dir / "metrics.jsonl").is_file() and '"step_seconds"' in _text(run_dir):
            first = time.time() - began
        time.sleep(0.1)
    if process.returncode or first is None:
        raise Failed((folder / "dstune.log").read_text()[-3000:])
    result = json.loads((run_dir / "result.json").read_text())
    rows = [row for row in map(json.loads, _text(run_dir).splitlines()) if "step_seconds" in row]
    return Measured(
        seconds=[row["step_seconds"] for row in rows],
        losses=[row["loss"] for row in rows],
        peak_memory_gib=result["peak_memory_gib"],
        first_step_seconds=first,
    )


def _text(run_dir: Path) -> str:
    return (run_dir / "metrics.jsonl").read_text()
