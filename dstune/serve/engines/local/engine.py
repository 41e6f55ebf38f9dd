"""The gateway's side of the local engine."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from dstune.core.child_python import child_environment
from dstune.serve.engines.base import Command, Engine, prompt_logprobs

_SAMPLING = frozenset(
    {"temperature", "top_p", "top_k", "min_p", "seed", "presence_penalty", "frequency_penalty", "repetition_penalty"}
    | {"logit_bias", "stop", "n", "stream", "stream_options", "user", "max_tokens", "logprobs", "return_token_ids"}
)
CHAT = _SAMPLING | {"model", "messages", "max_completion_tokens", "top_logprobs", "tools", "tool_choice"}
CHAT |= {"chat_template_kwargs", "safety_identifier"}
COMPLETION = _SAMPLING | {"model", "prompt"}
RESPONSE = frozenset({"model", "input", "instructions", "max_output_tokens", "temperature", "top_p", "stream", "user"})
RESPONSE |= {"safety_identifier"}
ENCODER_ROUTES: Mapping[str, Mapping[str, frozenset[str]]] = {
    "embed": {
        "/v1/embeddings": frozenset({"model", "input", "encoding_format", "user"}),
        "/rerank": frozenset({"model", "query", "documents", "texts", "top_n", "return_text", "user"}),
        "/score": frozenset({"model", "text_1", "text_2", "user"}),
    },
    "classify": {"/classify": frozenset({"model", "input", "user"}), "/v1/moderations": frozenset({"model", "input"})},
    "rank": {
        "/rerank": frozenset({"model", "query", "documents", "texts", "top_n", "return_text", "user"}),
        "/score": frozenset({"model", "text_1", "text_2", "user"}),
    },
    "tag": {"/tags": frozenset({"model", "input", "user"})},
    "answer": {"/answers": frozenset({"model", "question", "context", "user"})},
    "reward": {"/rewards": frozenset({"model", "messages", "user"})},
}

DEFAULT_MAX_TOKENS = 1024
"""Default limit of an answer to a conversation, if the context has room for it."""


@dataclass
class LocalEngine(Engine):
    name: ClassVar[str] = "local"
    reads_images: ClassVar[bool] = True
    knows_clients: ClassVar[bool] = True
    number_format: str = ""
    """`float32` or `bfloat16`; empty selects the format that the machine computes fastest."""

    @property
    def routes(self) -> Mapping[str, frozenset[str]]:
        if self.source.generates:
            return {"/v1/chat/completions": CHAT, "/v1/completions": COMPLETION, "/v1/responses": RESPONSE}
        return {path: fields for kind in self.source.serves for path, fields in ENCODER_ROUTES[kind].items()}

    def fits_without_max_tokens(self, answers: int, most: int) -> bool:
        return answers * DEFAULT_MAX_TOKENS <= most

    def command(self, folder: Path) -> Command:
        scratch = folder / "scratch"
        scratch.mkdir(mode=0o700)
        source = self.source
        settings: dict[str, Any] = {
            "socket": str(folder / "http"),
            "status": str(self.start_error_file),
            "scratch": str(scratch),
            "folder": source.load_from,
            "revision": source.load_revision,
            "trust_remote_code": source.trust_remote_code,
            "generates": source.generates,
            "plugins": source.plugins,
            "neutral_labels": source.neutral_labels,
            "base": self.base,
            "adapter": None,
            "dtype": self.number_format,
            "drain_seconds": self.limits.drain_seconds,
            "max_sequences": self.limits.max_sequences,
            "max_waiting": self.limits.max_waiting,
            "max_cached_tokens": self.limits.max_cached_tokens,
            "threads": self.limits.threads,
        }
        argv = [sys.executable, "-m", "dstune.serve.engines.local.process"]
        url, stdin = "http://engine", json.dumps(settings).encode() + b"\n"
        return Command(argv, child_environment(), url, str(folder / "http"), stdin)

    async def replace_adapter(self, name: str, folder: Path) -> None:
        request = {"lora_name": name, "lora_path": str(folder), "load_inplace": True}
        await self.ask("POST", "/v1/load_lora_adapter", request)

    async def logprobs_with_images(self, model: str, row: Mapping[str, Any]) -> list[float]:
        ids = [*row["prompt_ids"], *row["target_ids"]]
        body = {"model": model, "prompt": ids, "messages": row["messages"], "prompt_logprobs": 0}
        response = await self.ask("POST", "/v1/completions", body)
        return prompt_logprobs(response["choices"][0].get("prompt_logprobs"), ids)[-len(row["target_ids"]) :]

    async def answers(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        return await self.ask("POST", "/parity", {"rows": list(rows)})
