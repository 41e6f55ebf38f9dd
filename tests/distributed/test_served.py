"""Runs of reasoning and of tool calls, exported: plain transformers serves the context that was trained, and stops there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from support.command import Commands
from support.tiny import save_decoder
from unit.data_helpers import byte_tokenizer, write_jsonl
from unit.templates import QWEN3

from dstune.data.collate import NO_TARGET

SWITCHED = QWEN3.replace(
    "{{- '<|im_start|>assistant\n' }}{%- endif %}",
    "{{- '<|im_start|>assistant\n' }}{%- if enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}{%- endif %}",
)
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Paris"}}}


def reasoning(number: int) -> list[dict[str, Any]]:
    return [
        {"role": "user", "content": f"What is {number} and two?"},
        {"role": "assistant", "content": "It is more.", "reasoning_content": "Hm."},
    ]


def calling(number: int) -> list[dict[str, Any]]:
    return [
        {"role": "user", "content": f"The weather in {number} days?"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "sunny"},
        {"role": "assistant", "content": "It is sunny."},
    ]


@pytest.mark.parametrize(("rows", "thinks"), [(reasoning, True), (calling, False)], ids=["reasoning", "calls"])
def test_an_export_serves_what_was_trained(tmp_path: Path, rows: Any, thinks: bool) -> None:
    """The prompt that plain transformers renders is the trained context, token by token, and what it generates from there is
    the trained answer up to the token at which training stopped."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = byte_tokenizer(SWITCHED)
    model = save_decoder(
        tmp_path / "model", vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, pad_token_id=0
    )
    tokenizer.save_pretrained(model)
    data = write_jsonl(tmp_path / "rows.jsonl", [{"messages": rows(number)} for number in range(8)])
    run = tmp_path / "run"
    commands = Commands(tmp_path)
    ran = commands.run(
        "train",
        f"model.path={model}",
        f"data.train={data}",
        "data.max_length=256",
        "evaluate.every=0",
        "checkpoint.every=0",
        "data.split.validation=0",
        "data.packing=false",
        "optimizer.lr=0.01",
        "trainer.max_steps=60",
        "trainer.micro_batch_size=8",
        "trainer.global_batch_size=8",
        "trainer.precision=fp32",
        "launch.processes=1",
        "tracking.wandb.mode=disabled",
        f"run.dir={run}",
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    seconds = json.loads((run / "result.json").read_text())["start_seconds"]
    assert 0.0 < seconds["proof"] < 0.02 * sum(seconds.values()), "the proof takes under 2% of the start"
    exported = commands.run("export", str(run), "--out", str(tmp_path / "export"))
    assert exported.returncode == 0, exported.stderr
    served = AutoTokenizer.from_pretrained(tmp_path / "export")
    answering = AutoModelForCausalLM.from_pretrained(tmp_path / "export").eval()
    stops = np.atleast_1d(answering.generation_config.eos_token_id).tolist()
    (table,) = (tmp_path / "cache" / "data").glob("*/train.arrow")
    samples = datasets.Dataset.from_file(str(table))
    trained = [(sample["input_ids"], sample["labels"]) for sample in samples]
    messages = rows(3)
    for number in (at for at, message in enumerate(messages) if message["role"] == "assistant"):
        context = served.apply_chat_template(messages[:number], add_generation_prompt=True, return_dict=False)
        assert served.decode(context).endswith("assistant\n" if thinks else "assistant\n<think>\n\n</think>\n\n")
        (labels,) = (
            labels[len(context) :]
            for ids, labels in trained
            if ids[: len(context)] == context and labels[len(context)] != NO_TARGET
        )
        answer = labels[: next((at for at, label in enumerate(labels) if label == NO_TARGET), len(labels))]
        assert answer[-1] in stops
        assert not set(answer[:-1]) & set(stops)
        with torch.no_grad():
            written = answering.generate(torch.tensor([context]), max_new_tokens=200, do_sample=False)
        assert served.decode(written[0, len(context) :]) == served.decode(answer)
        assert written[0, len(context) :].tolist() == answer
