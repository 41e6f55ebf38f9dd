"""Runs of every method and stage with checkpoints of real ranks, and what reads their exports."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dstune.config.compose import compose
from dstune.config.run_file import write_run
from tests.support.ranks import run_ranks
from tests.support.tiny import save_decoder, save_encoder, save_t5, write_dialogues, write_labelled, write_pairs

PROGRAM = Path(__file__).with_name("export_cases.py")
LORA = ["method=lora", "method.rank=4", "optimizer.lr=0.05"]

# name: (model, data, overrides). Every stage, every method, tied and untied, several parameter groups, tiny parameters
# partitioned and not.
CASES: dict[str, tuple[str, str, list[str]]] = {
    **{f"full-{stage}": ("untied", "chat", ["method=full", f"zero=stage{stage}"]) for stage in range(4)},
    "full-bf16-1": ("untied", "chat", ["method=full", "zero=stage1", "trainer.precision=bf16"]),
    "tied-0": ("tied", "chat", ["method=full", "zero=stage0"]),
    "tied-2": ("tied", "chat", ["method=full", "zero=stage2"]),
    "tied-3": ("tied", "chat", ["method=full", "zero=stage3", "zero.param_persistence_threshold=100000"]),
    **{f"lora-{stage}": ("untied", "chat", [*LORA, f"zero=stage{stage}"]) for stage in range(4)},
    "lora-bf16-stored-3": ("stored_bf16", "chat", [*LORA, "zero=stage3"]),
    "lora-random-2": ("untied", "chat", [*LORA, "zero=stage2", "model.weights=random"]),
    "lora-tied-head-0": ("tied", "chat", [*LORA, "zero=stage0", "method.target_modules=[q_proj,lm_head]"]),
    "lora-tied-whole-2": ("tied", "chat", [*LORA, "zero=stage2", "method.modules_to_save=[embed_tokens,lm_head]"]),
    "lora-tied-rows-3": ("tied", "chat", [*LORA, "zero=stage3", "method.target_modules=[q_proj,embed_tokens]"]),
    "seq2seq-head-2": ("t5", "seq2seq", [*LORA, "zero=stage2", "method.target_modules=[q,v,lm_head]"]),
    **{f"alone-{stage}": ("tied", "chat", ["method=full", f"zero=stage{stage}"]) for stage in (2, 3)},
    "stored-bf16-2": ("stored_bf16", "chat", ["method=full", "zero=stage2"]),
    "labels-2": ("encoder", "classification", ["method=full", "zero=stage2"]),
    "labels-head-3": ("encoder", "classification", ["method=head", "zero=stage3"]),
    "labels-lora-3": ("encoder", "classification", [*LORA, "zero=stage3"]),
    "pooler-lora-2": ("no_pooler", "classification", [*LORA, "zero=stage2"]),
    "pooler-head-3": ("no_pooler", "classification", ["method=head", "zero=stage3"]),
    **{
        f"tokens-{model}-{stage}": (model, "chat", [*LORA, f"zero=stage{stage}", "model.chat_template=llama3"])
        for model, stage in (("untied", 0), ("tied", 1), ("untied", 2), ("tied", 3), ("untied", 3))
    },
    "control-2": ("untied", "chat", [*LORA, "zero=stage2", "model.chat_template=chatml"]),
    "tokens-full-3": ("untied", "chat", ["method=full", "zero=stage3", "model.chat_template=llama3"]),
}


def in_bf16(folder: Path) -> Path:
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(folder).bfloat16().save_pretrained(folder)
    return folder


def without_pooler(folder: Path) -> Path:
    """Save a copy without a pooler, as many published encoders are: transformers draws a pooler for them."""
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    remaining = {name: weight for name, weight in weights.items() if "pooler" not in name}
    assert len(remaining) == len(weights) - 2
    save_file(remaining, folder / "model.safetensors", {"format": "pt"})
    return folder


class Shelf:
    """The runs that the tests export."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.models = {
            "untied": save_decoder(folder / "models" / "untied"),
            "tied": save_decoder(folder / "models" / "tied", tied=True),
            "stored_bf16": in_bf16(save_decoder(folder / "models" / "stored_bf16")),
            "encoder": save_encoder(folder / "models" / "encoder"),
            "t5": save_t5(folder / "models" / "t5"),
            "no_pooler": without_pooler(save_encoder(folder / "models" / "no_pooler")),
        }
        self.data = {
            "chat": write_dialogues(folder / "chat.jsonl", 40),
            "classification": write_labelled(folder / "labels.jsonl", 40),
            "seq2seq": write_pairs(folder / "pairs.jsonl", 40),
        }

    def run(self, name: str) -> Path:
        return self.folder / name

    def model(self, name: str) -> Path:
        return self.models[CASES[name][0]]

    def prepare(self, name: str) -> None:
        model, data, overrides = CASES[name]
        composed = compose(
            [
                "data=files",
                f"data.train={self.data[data]}",
                "data.max_length=64",
                "data.split.validation=0.2",
                f"data.packing={data == 'chat'}",
                f"task={data}",
                f"model.path={self.models[model]}",
                "model.attention=sdpa",
                "trainer.precision=fp32",
                "trainer.micro_batch_size=2",
                "trainer.global_batch_size=4",
                "trainer.max_steps=3",
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

    def whole(self, name: str, step: int = 3) -> dict[str, torch.Tensor]:
        """Return the trained weights as the ranks had them."""
        return torch.load(self.run(name) / f"whole-step-{step:08d}.pt")


def filled_shelf(folder: Path) -> Shelf:
    shelf = Shelf(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DSTUNE_CACHE", str(shelf.folder / "cache"))
        for name in CASES:
            shelf.prepare(name)
        # Three ranks: most parameters are not divisible, so stage 3 pads them.
        alone = [name for name in CASES if name.startswith("alone")]
        run_ranks(PROGRAM, 3, [str(shelf.run(name)) for name in CASES if name not in alone])
        run_ranks(PROGRAM, 1, [str(shelf.run(name)) for name in alone])
    return shelf


def load(folder: Path, kind: str = "CausalLM", **settings):
    """Load an export as anyone would; nothing may be missing."""
    import transformers

    loader = getattr(transformers, f"AutoModelFor{kind}")
    model, report = loader.from_pretrained(folder, output_loading_info=True, **settings)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    return model.eval()


def token_ids() -> torch.Tensor:
    return torch.arange(9, 73).view(2, 32)


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=token_ids(), use_cache=False).logits


def with_weights(model, weights: dict[str, torch.Tensor]):
    """Return `model` with the named weights in place of its own."""
    report = model.load_state_dict(weights, strict=False)
    assert not report.unexpected_keys
    model.eval()
    return model
