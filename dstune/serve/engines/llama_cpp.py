"""llama.cpp for GGUF files: its program `llama-server`, started by its command line."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from dstune.core.errors import Problem, UserError
from dstune.data.template_date import freeze_date
from dstune.serve.engines.base import Command, Engine, Unprovable
from dstune.serve.engines.special import SpecialTexts

_SAMPLING = frozenset(
    {"temperature", "top_p", "top_k", "min_p", "seed", "presence_penalty", "frequency_penalty", "logit_bias", "stop"}
    | {"stream", "stream_options", "user", "max_tokens"}
)
CHAT = _SAMPLING | {"model", "messages", "max_completion_tokens", "response_format", "safety_identifier"}
CHAT |= {"logprobs", "top_logprobs"}
COMPLETION = _SAMPLING | {"model", "prompt"}


@dataclass
class LlamaCppEngine(Engine):
    name: ClassVar[str] = "llama.cpp"
    program: str | None = None
    arguments: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._key = secrets.token_urlsafe(32)
        self._special: SpecialTexts | None = None
        self.dtype = (
            "float32"  # of what it tells; it tells no log-probabilities of a prompt, so nothing is compared in it
        )

    @property
    def headers(self) -> dict[str, str]:
        return {"authorization": f"Bearer {self._key}"}

    @property
    def routes(self) -> Mapping[str, frozenset[str]]:
        return {"/v1/chat/completions": CHAT, "/v1/completions": COMPLETION}

    def command(self, folder: Path) -> Command:
        program = self.program or shutil.which("llama-server")
        if program is None or not Path(program).is_file():
            reason = "there is no program `llama-server`"
            raise UserError(Problem("--engine-python", reason, "--engine-python /path/to/llama-server", program or ""))
        files = [] if self.source.folder is None else sorted(self.source.folder.glob("*.gguf"))
        if len(files) != 1:
            reason = f"holds {len(files)} GGUF files, one is served"
            raise UserError(Problem("MODEL", reason, "dstune export RUN --gguf", self.source.path))
        # Loopback is open to every user of the machine, so the engine has a key of its own; it goes by a file, since a
        # command line can be read by all.
        key_file = folder / "key"
        descriptor = os.open(key_file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        os.write(descriptor, f"{self._key}\n".encode())
        os.close(descriptor)
        port = _free_port()
        own = ["--model", str(files[0]), "--alias", self.base, "--host", "127.0.0.1", "--port", str(port)]
        own += ["--api-key-file", str(key_file), "--jinja", "--no-webui"]
        if self.source.template is not None:
            template = folder / "chat_template.jinja"
            template.write_text(freeze_date(self.source.template, self.source.template_date), encoding="utf-8")
            own += ["--chat-template-file", str(template)]
        return Command([program, *own, *self.arguments], os.environ, f"http://127.0.0.1:{port}")

    def learn(self) -> None:
        self._special = self._special or SpecialTexts.of(self.source)

    def outgoing(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        assert self._special is not None, "requests come after the start"
        self._special.refuse(body)
        kept = {name: value for name, value in body.items() if name not in ("user", "safety_identifier")}
        # Older ones do not know this name, and would write without end.
        most = kept.pop("max_completion_tokens", None)
        return kept if most is None else kept | {"max_tokens": most}

    async def prompt_ids(self, model: str, row: Mapping[str, Any]) -> list[int]:
        text = row.get("text")
        if text is None:
            requested = {"messages": row["messages"]} | ({"tools": row["tools"]} if row.get("tools") else {})
            text = (await self.ask("POST", "/apply-template", requested))["prompt"]
        body = {"content": text, "add_special": "messages" not in row, "parse_special": True}
        ids: list[int] = (await self.ask("POST", "/tokenize", body))["tokens"]
        return ids

    async def logprobs(self, model: str, ids: Sequence[int]) -> list[float]:
        raise Unprovable("its tokens are those of the training; llama.cpp tells no log-probabilities of a prompt")


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port
