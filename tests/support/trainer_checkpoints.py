"""Checkpoints as transformers' Trainer writes them with DeepSpeed, made by hand (tests/parity/test_half_finished.py: real ones)."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import torch

from support.tiny import save_decoder

ROWS = 45
SETTINGS: dict[str, Any] = {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "max_steps": 16,
    "learning_rate": 1e-2,
    "weight_decay": 0.1,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 3,
    "seed": 7,
    "gradient_checkpointing": False,
}


def write_rows(path: Path, count: int = ROWS) -> Path:
    """Write rows of token ids, each with its number in its first tokens."""
    randoms = random.Random(0)
    with path.open("w") as stream:
        for number in range(count):
            ids = [1, 5 + number // 40, 5 + number % 40] + [randoms.randrange(5, 100) for _ in range(5 + number % 14)]
            stream.write(json.dumps({"input_ids": ids, "labels": [-100] * 3 + ids[3:]}) + "\n")
    return path


def shapes_of(model: Path) -> list[dict[str, torch.Size]]:
    """Return the shapes of the weights with and without decay, in the Trainer's order."""
    from safetensors import safe_open

    with safe_open(model / "model.safetensors", framework="pt") as opened:
        shapes = {name: torch.Size(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
    return [{name: shape for name, shape in shapes.items() if (len(shape) < 2) is flat} for flat in (False, True)]


def elements(seed: int, shapes: dict[str, torch.Size]) -> torch.Tensor:
    """Return the same random elements for the same seed."""
    count = sum(math.prod(shape) for shape in shapes.values())
    return torch.rand(count, generator=torch.Generator().manual_seed(seed))


def write_checkpoint(
    folder: Path,
    *,
    ranks: int = 2,
    step: int = 8,
    arguments: Any = None,
    group: dict[str, Any] | None = None,
    **settings: Any,
) -> Path:
    """Write `checkpoint-STEP` of stage 2 into `folder`, and its rows and model beside it."""
    from transformers import TrainingArguments

    model = save_decoder(folder / "model")
    write_rows(folder / "rows.jsonl")
    checkpoint = save_decoder(folder / f"checkpoint-{step}")
    settings = SETTINGS | settings
    torch.save(
        TrainingArguments(output_dir="out", report_to=[], use_cpu=True, **settings) if arguments is None else arguments,
        checkpoint / "training_args.bin",
    )
    batches = -(-ROWS // (2 * ranks))
    per_epoch = -(-batches // 2)
    epoch, index = divmod(step - 1, per_epoch)
    state = {
        "epoch": epoch + min(2 * index + 2, batches) / batches,
        "global_step": step,
        "max_steps": settings["max_steps"],
        "log_history": [],
    }
    (checkpoint / "trainer_state.json").write_text(json.dumps(state))
    (checkpoint / "latest").write_text(f"global_step{step}")
    shards = checkpoint / f"global_step{step}"
    shards.mkdir()
    shapes = shapes_of(model)
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 2,
        "train_batch_size": 4 * ranks,
        "gradient_clipping": 1.0,
    }
    torch.save(
        {
            "module": {},
            "buffer_names": [],
            "param_shapes": shapes,
            "global_steps": step,
            "ds_config": config,
            "dp_world_size": ranks,
        },
        shards / "mp_rank_00_model_states.pt",
    )
    plain = {"lr": 5e-3, "betas": (0.9, 0.999), "eps": 1e-8, "initial_lr": 1e-2, "amsgrad": False, **(group or {})}
    for rank in range(ranks):
        pieces: dict[str, list[torch.Tensor]] = {}
        for kind, seed in (("weight", 10), ("exp_avg", 20), ("exp_avg_sq", 30)):
            vectors = [elements(seed + number, members) for number, members in enumerate(shapes)]
            padded = [torch.cat([vector, torch.zeros(-len(vector) % ranks)]) for vector in vectors]
            pieces[kind] = [vector.chunk(ranks)[rank].clone() for vector in padded]
        moments = {
            number: {
                "step": torch.tensor(float(step)),
                "exp_avg": pieces["exp_avg"][number],
                "exp_avg_sq": pieces["exp_avg_sq"][number],
            }
            for number in range(len(shapes))
        }
        groups = [
            {**plain, "weight_decay": 0.0 if number else 0.1, "params": [number]} for number in range(len(shapes))
        ]
        optimizer = {
            "zero_stage": 2,
            "partition_count": [ranks] * len(shapes),
            "base_optimizer_state": {"state": moments, "param_groups": groups},
            "single_partition_of_fp32_groups": pieces["weight"],
        }
        torch.save({"optimizer_state_dict": optimizer}, shards / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    return checkpoint
