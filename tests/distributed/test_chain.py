"""The chain of two trainings: an adapter by SFT, DPO on from it, a merged model, by the command line and on real ranks."""

from __future__ import annotations

import json
import math
from pathlib import Path

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from support.command import Commands, metrics, result
from support.tiny import save_decoder, write_dialogues, write_preferences

COMMON = [
    "model.path=model",
    "data.max_length=48",
    "evaluate.every=0",
    "checkpoint.every=0",
    "data.packing=false",
    "data.split.validation=0.2",
    "trainer.precision=fp32",
    "trainer.micro_batch_size=2",
    "trainer.global_batch_size=8",
    "trainer.max_steps=3",
    "optimizer.lr=1e-2",
    "schedule=constant",
    "evaluate.at_start=false",
    "launch.processes=2",
]
TOKENS = torch.arange(9, 73).view(2, 32)


@pytest.fixture(scope="module")
def chain(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("chain")
    save_decoder(folder / "model")
    write_dialogues(folder / "chat.jsonl", 24)
    write_preferences(folder / "pairs.jsonl", 24)
    command = Commands(folder)
    lora = ["train", "method=lora", *COMMON]
    for arguments in (
        [*lora, "data.train=chat.jsonl", "method.rank=4", "zero=stage3", "run.dir=sft"],
        [*lora, "data.train=pairs.jsonl", "task=preference", "method.adapter=sft", "zero=stage2", "run.dir=dpo"],
        ["export", "dpo", "--merge"],
    ):
        done = command.run(*arguments)
        assert done.returncode == 0, done.stdout + done.stderr
    return folder


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=TOKENS, attention_mask=torch.ones_like(TOKENS)).logits


def test_dpo_begins_with_the_adapter_and_compares_with_it(chain):
    """The reference is the model with the SFT adapter: the loss begins at log 2. Against the base model it would not."""
    first = next(row for row in metrics(chain / "dpo") if "loss" in row)
    assert first["loss"] == pytest.approx(math.log(2), rel=1e-5)
    assert first["reward_margin"] == pytest.approx(0, abs=1e-5)
    before, after = (load_file(chain / run / "export" / "adapter_model.safetensors") for run in ("sft", "dpo"))
    assert before.keys() == after.keys() and before
    assert all(weight.shape == after[name].shape for name, weight in before.items())
    settings = json.loads((chain / "dpo" / "export" / "adapter_config.json").read_text())
    assert settings["r"] == 4  # that of the adapter, though nobody has given it again
    # Moved by three steps of 1e-2 at most: continued, not begun anew.
    moved = max(float((weight - after[name]).abs().max()) for name, weight in before.items())
    assert 1e-3 < moved < 0.04
    assert result(chain / "dpo")["eval_final"]["loss"] != pytest.approx(math.log(2), rel=1e-3)


def test_the_merged_model_answers_as_the_base_with_the_adapter(chain):
    base = logits(transformers.AutoModelForCausalLM.from_pretrained(chain / "model"))
    after_sft, unmerged = (
        logits(peft.AutoPeftModelForCausalLM.from_pretrained(chain / run / "export")) for run in ("sft", "dpo")
    )
    merged = logits(transformers.AutoModelForCausalLM.from_pretrained(chain / "dpo" / "export-merged"))
    scale = float(unmerged.abs().max())
    assert float((merged - unmerged).abs().max()) < 1e-5 * scale
    for other in (base, after_sft):  # neither training was lost on the way
        assert float((merged - other).abs().max()) > 1e-3 * scale
