"""Runs of reasoning and of tool calls, exported: plain transformers serves the context that was trained, and stops there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.command import Commands
from support.tiny import save_decoder
from unit.data_helpers import byte_tokenizer, write_jsonl
from unit.templates import QWEN3

SWITCHED = QWEN3.replace(
    "{{- '<|im_start|>assistant\n' }}{%- endif %}",
    "{{- '<|im_start|>assistant\n' }}{%- if enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}{%- endif %}",
)
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Paris"}}}


def reasoning(number: int) -> list[dict[str, Any]]:
    return [
        {"role": "user", "content": f"What is {number} and two?"},
        {"role": "assistant", "content": f"The answer is {number + 2}.", "reasoning_content": "Hm."},
    ]


def calling(number: int) -> list[dict[str, Any]]:
    return [
        {"role": "user", "content": f"The weather in {number} days?"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "sunny"},
        {"role": "assistant", "content": f"It is sunny in {number} days."},
    ]


@pytest.mark.parametrize(("rows", "thinks"), [(reasoning, True), (calling, False)], ids=["reasoning", "calls"])
def test_an_export_serves_what_was_trained(tmp_path: Path, rows: Any, thinks: bool) -> None:
    from transformers import AutoTokenizer, GenerationConfig

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
        "data.split.validation=0",
        "data.packing=false",
        "trainer.max_steps=1",
        "trainer.micro_batch_size=2",
        "trainer.global_batch_size=2",
        "launch.processes=1",
        "tracking.wandb.mode=disabled",
        f"run.dir={run}",
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    exported = commands.run("export", str(run), "--out", str(tmp_path / "export"))
    assert exported.returncode == 0, exported.stderr
    served = AutoTokenizer.from_pretrained(tmp_path / "export")
    stops = GenerationConfig.from_pretrained(tmp_path / "export").eos_token_id
    formatted = json.loads(commands.run("data", "show", str(run), "--rows", "16", "--json").stdout)
    trained = {tuple(text_of(row)) for row in formatted["rows"]}
    for number in range(8):
        messages = rows(number)
        requested = served.apply_chat_template(messages[:1], add_generation_prompt=True, tokenize=False)
        assert requested.endswith("assistant\n" if thinks else "assistant\n<think>\n\n</think>\n\n")
        answers = {answer for context, answer in trained if context == requested}
        assert len(answers) == 1
        (answer,) = answers
        last = served(answer, add_special_tokens=False)["input_ids"][-1]
        assert last in np.atleast_1d(stops)


def text_of(row: dict[str, Any]) -> tuple[str, str]:
    """The context of the first trained turn, and the turn."""
    kinds = [segment["trained"] for segment in row["segments"]]
    first = kinds.index(True)
    last = next((at for at in range(first, len(kinds)) if not kinds[at]), len(kinds))
    texts = [segment["text"] for segment in row["segments"]]
    return "".join(texts[:first]), "".join(texts[first:last])
