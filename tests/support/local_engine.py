"""The local engine in the process of a test, with a client in the same loop."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import httpx2
import torch

from dstune.config.schema import ModelConfig
from dstune.inference.voices import open_speaker
from dstune.serve.engines.local.app import LanguageApp
from dstune.serve.engines.local.model import LocalModel
from dstune.serve.engines.local.scheduler import Scheduler

TOOLS = [{"type": "function", "function": {"name": "look", "description": "d", "parameters": {"type": "object"}}}]
HERMES = (
    "{% if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}{% endfor %}<|im_end|>\n{% endif %}"
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + (message['content'] or '') }}"
    "{% for call in message.tool_calls or [] %}<tool_call>\n{{ call.function | tojson }}\n</tool_call>{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


class Engine:
    """The application with a client in the same loop."""

    def __init__(self, folder: Path, **limits: Any):
        self._opened = open_speaker(ModelConfig(path=str(folder)), "last", {})
        self.model = LocalModel(self._opened.__enter__(), "base", None)
        self.scheduler = Scheduler(self.model.model, self.model.use_adapter, **limits)
        self.app = LanguageApp(self.model, self.scheduler)

    def close(self) -> None:
        self.scheduler.stop()
        self._opened.__exit__(None, None, None)

    def run(self, test):
        async def main():
            transport = httpx2.ASGITransport(app=self.app)
            async with httpx2.AsyncClient(transport=transport, base_url="http://engine", timeout=60) as client:
                return await test(client)

        return asyncio.run(main())

    def chat(self, text="w1 w2", **fields) -> dict:
        async def one(client):
            return (await client.post("/v1/chat/completions", json=body(text, **fields))).json()

        return self.run(one)

    def raw(self, text="w1 w2", **fields) -> str:
        async def one(client):
            return (await client.post("/v1/chat/completions", json=body(text, **fields))).text

        return self.run(one)

    def says(self, text="w1 w2", **fields) -> list[str]:
        return [choice["message"]["content"] for choice in self.chat(text, **fields)["choices"]]


def body(text="w1 w2", **fields) -> dict:
    messages = [{"role": "user", "content": text}]
    return {"model": "base", "messages": messages, "max_tokens": 8, "temperature": 0} | fields


def greedy(folder):
    """Return greedy text of transformers alone."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)

    def answer(text: str, count: int) -> str:
        messages = [{"role": "user", "content": text}]
        rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(rendered, add_special_tokens=False, return_tensors="pt").input_ids
        with torch.no_grad():
            written = model.generate(input_ids=ids, max_new_tokens=count, do_sample=False)[0, ids.shape[1] :]
        return tokenizer.decode(written, skip_special_tokens=True)

    return answer
