"""A program that behaves towards its clients as vLLM 0.32 was seen to, with a tiny model: `vllm serve MODEL ...`.

Recorded of vLLM: `/tokenize` renders messages with the server's template, also for adapters; text that reads like a special
token becomes one; `prompt_logprobs`; an adapter that does not fit is "added successfully" and answers as the base.
"""

from __future__ import annotations

import argparse
import json
import os
import stat
import sys
from pathlib import Path
from typing import Any


def install(folder: Path) -> Path:
    """Make an environment in `folder` whose `vllm` is this program. Returns its Python."""
    (folder / "bin").mkdir(parents=True)
    program = folder / "bin" / "vllm"
    program.write_text(f"#!{sys.executable}\nimport runpy\nrunpy.run_path({__file__!r}, run_name='__main__')\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    python = folder / "bin" / "python"
    python.symlink_to(sys.executable)
    return python


class Double:
    def __init__(self, arguments: argparse.Namespace):
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        torch.set_num_threads(1)
        self.arguments = arguments
        self.tokenizer = AutoTokenizer.from_pretrained(arguments.tokenizer or arguments.model)
        if arguments.chat_template:
            self.tokenizer.chat_template = Path(arguments.chat_template).read_text()
        self.load = lambda: AutoModelForCausalLM.from_pretrained(
            arguments.model, dtype=getattr(torch, arguments.dtype)
        ).eval()
        self.models: dict[str, Any] = {arguments.served_model_name: self.load()}
        self.context = self.models[arguments.served_model_name].config.max_position_embeddings

    def tokenize(self, body: dict[str, Any]) -> dict[str, Any]:
        if "messages" in body:
            text = self.tokenizer.apply_chat_template(
                body["messages"],
                tools=body.get("tools"),
                tokenize=False,
                add_generation_prompt=True,
                **body.get("chat_template_kwargs", {}),
            )
            ids = self.tokenizer(text, add_special_tokens=False).input_ids
        else:
            ids = self.tokenizer(body["prompt"]).input_ids
        return {"tokens": ids, "count": len(ids)}

    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        import torch

        model, ids = self.models[body["model"]], body["prompt"]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0].float().log_softmax(-1)
        told = [
            None,
            *({str(token): {"logprob": float(logits[at, token]), "rank": 1}} for at, token in enumerate(ids[1:])),
        ]
        return {"choices": [{"index": 0, "text": "", "finish_reason": "length", "prompt_logprobs": told}]}

    def chat(self, body: dict[str, Any]) -> dict[str, Any]:
        import torch

        ids = self.tokenize(body)["tokens"]
        with torch.no_grad():
            written = (
                self.models[body["model"]]
                .generate(input_ids=torch.tensor([ids]), max_new_tokens=body.get("max_tokens", 8), do_sample=False)[
                    0, len(ids) :
                ]
                .tolist()
            )
        text = self.tokenizer.decode(written, skip_special_tokens=True)
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "length"}
        return {
            "id": "chatcmpl-double",
            "object": "chat.completion",
            "created": 1,
            "model": body["model"],
            "choices": [choice],
        }

    def add(self, body: dict[str, Any]) -> dict[str, Any]:
        import peft

        if not self.arguments.enable_lora or os.environ.get("VLLM_ALLOW_RUNTIME_LORA_UPDATING") != "1":
            raise LookupError
        if body["lora_name"] in self.models:
            raise ValueError(f"The lora adapter '{body['lora_name']}' has already been loaded.")
        model = self.load()
        try:
            model = peft.PeftModel.from_pretrained(model, body["lora_path"]).eval()
        except Exception:
            model = self.load()  # without a word
        self.models[body["lora_name"]] = model
        return {}

    def remove(self, body: dict[str, Any]) -> dict[str, Any]:
        self.models.pop(body["lora_name"])
        return {}

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        routes = {
            "/health": lambda given: {},
            "/v1/models": lambda given: {"data": [{"id": name, "max_model_len": self.context} for name in self.models]},
            "/tokenize": self.tokenize,
            "/v1/completions": self.complete,
            "/v1/chat/completions": self.chat,
            "/v1/load_lora_adapter": self.add,
            "/v1/unload_lora_adapter": self.remove,
        }
        try:
            status, answer = 200, routes[scope["path"]](json.loads(body or b"{}"))
        except ValueError as error:
            status, answer = 400, {"error": {"message": str(error)}}
        except LookupError as error:
            status, answer = 404, {"error": {"message": str(error)}}
        await send(
            {"type": "http.response.start", "status": status, "headers": [(b"content-type", b"application/json")]}
        )
        await send({"type": "http.response.body", "body": json.dumps(answer).encode()})


def main() -> None:
    import uvicorn

    parser = argparse.ArgumentParser()
    parser.add_argument("serve")
    parser.add_argument("model")
    parser.add_argument("--uds", required=True)
    parser.add_argument("--served-model-name", required=True)
    parser.add_argument("--tokenizer")
    parser.add_argument("--chat-template")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--enable-lora", action="store_true")
    parser.add_argument("--max-lora-rank", type=int, default=16)
    parser.add_argument("--enable-auto-tool-choice", action="store_true")
    parser.add_argument("--tool-call-parser")
    parser.add_argument("--shutdown-timeout", type=int)
    parser.add_argument("--chat-template-content-format", choices=["auto", "string", "openai"])
    arguments = parser.parse_args()
    uvicorn.run(Double(arguments), uds=arguments.uds, log_level="warning", lifespan="off")


if __name__ == "__main__":
    main()
