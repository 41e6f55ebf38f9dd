"""Runs on vision-language checkpoints with rows of text, on real ranks, for the tests of what is trained and exported."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dstune.config.compose import compose
from dstune.config.run_file import write_run
from tests.support.exports import PROGRAM
from tests.support.ranks import run_ranks
from tests.support.tiny import write_dialogues
from tests.support.tiny_vl import save

LORA = ["method=lora", "method.rank=4", "optimizer.lr=0.05"]
UNPACKED = {"qwen3_5", "qwen3_vl"}
"""Whose samples see each other in packed rows: linear attention, and positions of three dimensions."""

# name: (kind of model, overrides).
CASES: dict[str, tuple[str, list[str]]] = {
    **{f"gemma3-full-{stage}": ("gemma3", ["method=full", f"zero=stage{stage}"]) for stage in range(4)},
    **{f"gemma3-lora-{stage}": ("gemma3", [*LORA, f"zero=stage{stage}"]) for stage in range(4)},
    "gemma3-freeze-2": ("gemma3", ["method=freeze", "method.first_layers=1", "zero=stage2"]),
    "gemma3-decay-1": ("gemma3", ["method=full", "method.layer_decay=0.5", "zero=stage1"]),
    "gemma3-ulmfit-2": ("gemma3", ["method=ulmfit", "method.unfreeze_steps=1", "zero=stage2"]),
    "gemma3-importance-2": ("gemma3", ["method=importance", "method.share=0.5", "zero=stage2"]),
    "gemma3-ia3-2": ("gemma3", ["method=ia3", "zero=stage2", "method.target_modules=[k_proj,v_proj]"]),
    "gemma3-oft-2": ("gemma3", ["method=oft", "method.block_size=4", "zero=stage2"]),
    "gemma3-vera-2": ("gemma3", ["method=vera", "method.rank=8", "zero=stage2"]),
    "gemma3-dora-3": ("gemma3", [*LORA, "method.dora=true", "zero=stage3"]),
    "gemma3-tokens-3": ("gemma3", [*LORA, "zero=stage3", "model.chat_template=llama3"]),
    "gemma3-old-2": ("gemma3", ["method=full", "zero=stage2", "model.unreached_parts=trained"]),
    **{f"qwen3_5-full-{stage}": ("qwen3_5", ["method=full", f"zero=stage{stage}"]) for stage in (2, 3)},
    **{f"qwen3_5-lora-{stage}": ("qwen3_5", [*LORA, f"zero=stage{stage}"]) for stage in (0, 3)},
    "qwen3_5-old-2": ("qwen3_5", [*LORA, "zero=stage2", "model.unreached_parts=trained"]),
    "qwen3_5-old-full-1": ("qwen3_5", ["method=full", "zero=stage1", "model.unreached_parts=trained"]),
    "mistral3-full-1": ("mistral3", ["method=full", "zero=stage1"]),
    "mistral3-lora-3": ("mistral3", [*LORA, "zero=stage3"]),
    "gemma4-full-3": ("gemma4", ["method=full", "zero=stage3"]),
    "gemma4-lora-2": ("gemma4", [*LORA, "zero=stage2"]),
    "qwen3_vl-full-2": ("qwen3_vl", ["method=full", "zero=stage2"]),
    "qwen3_vl-lora-3": ("qwen3_vl", [*LORA, "zero=stage3"]),
}


class Shelf:
    """The models, and the runs of `CASES`."""

    def __init__(self, folder: Path, cases: list[str]):
        self.folder, self.cases = folder, cases
        self.models = {
            kind: save(kind, folder / "models" / kind) for kind in sorted({CASES[name][0] for name in cases})
        }
        self.data = write_dialogues(folder / "chat.jsonl", 40)

    def run(self, name: str) -> Path:
        return self.folder / name

    def model(self, name: str) -> Path:
        return self.models[CASES[name][0]]

    def prepare(self, name: str) -> None:
        kind, overrides = CASES[name]
        composed = compose(
            [
                "data=files",
                f"data.train={self.data}",
                "data.max_length=64",
                "data.split.validation=0.2",
                f"data.packing={kind not in UNPACKED}",
                "task=chat",
                f"model.path={self.models[kind]}",
                "model.attention=sdpa",
                "trainer.precision=fp32",
                "trainer.micro_batch_size=2",
                "trainer.global_batch_size=4",
                "trainer.max_steps=2",
                "optimizer.weight_decay=0.1",
                "zero.param_persistence_threshold=0",
                "checkpoint.every=2",
                "evaluate.every=0",
                "evaluate.at_start=false",
                "tracking.wandb.mode=disabled",
                *overrides,
            ]
        )
        self.run(name).mkdir()
        write_run(self.run(name) / "run.yaml", composed)

    def whole(self, name: str, step: int = 2) -> dict[str, torch.Tensor]:
        """Return the weights as the ranks had them, frozen ones included."""
        return torch.load(self.run(name) / f"whole-step-{step:08d}.pt")


def filled_shelf(folder: Path, cases: list[str] | None = None) -> Shelf:
    shelf = Shelf(folder, list(CASES) if cases is None else cases)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DSTUNE_CACHE", str(shelf.folder / "cache"))
        for name in shelf.cases:
            shelf.prepare(name)
        run_ranks(PROGRAM, 2, [str(shelf.run(name)) for name in shelf.cases])
    return shelf
