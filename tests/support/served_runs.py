"""Runs with one checkpoint, made without training: the model as training builds it, with trained weights drawn from a seed."""

from __future__ import annotations

from pathlib import Path

import torch

from dstune.checkpoint import store
from dstune.config.compose import compose
from dstune.config.run_file import read_run, write_run
from dstune.models.load import load_model, load_tokenizer
from dstune.protocols import method_of

CHECKPOINT = "mp_rank_00_model_states.pt"


def save_run(
    folder: Path,
    model: Path,
    data: Path,
    *overrides: str,
    seed: int = 0,
    scale: float = 0.2,
    labels: tuple[str, ...] = (),
) -> Path:
    """Write a run directory whose trained parameters differ from the model's by normal numbers times `scale`."""
    folder.mkdir(parents=True)
    held_out = "data.split.validation=0.3"
    run_overrides = [
        f"model.path={model}",
        "data=files",
        f"data.train={data}",
        held_out,
        "data.max_length=128",
        *overrides,
    ]
    write_run(folder / "run.yaml", compose([*run_overrides, f"run.name={folder.name}", "trainer.precision=fp32"]))
    config = read_run(folder / "run.yaml").config
    tokenizer = load_tokenizer(config.model)
    body = load_model(config, tokenizer, labels, torch.float32)
    module = method_of(config.method).apply(body, config)
    draw = torch.Generator().manual_seed(seed)
    trained = {
        name: parameter.detach() + scale * torch.randn(parameter.shape, generator=draw)
        for name, parameter in module.named_parameters()
        if parameter.requires_grad
    }
    written = store.folder(folder) / f"{store.tag(3)}.incomplete"
    written.mkdir(parents=True)
    torch.save({"module": trained, "buffer_names": [], "global_steps": 3}, written / CHECKPOINT)
    store.commit(written, {"step": 3, "labels": list(labels), "best": None})
    return folder
