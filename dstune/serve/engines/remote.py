"""An external server with OpenAI's API, at an address that the operator allows."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import urlsplit

from dstune.core.errors import Problem, UserError
from dstune.core.network import LOOPBACK
from dstune.serve import fields
from dstune.serve.engines.base import Command, Engine, Unprovable, context_of


@dataclass
class RemoteEngine(Engine):
    """An external server. The model's path is its name there."""

    name: ClassVar[str] = "remote"
    starts_process: ClassVar[bool] = False
    health: ClassVar[str] = "/v1/models"
    health_seconds: ClassVar[float] = 30.0
    address: str = ""
    key: str = ""

    @property
    def headers(self) -> dict[str, str]:
        return {"authorization": f"Bearer {self.key}"} if self.key else {}

    @property
    def routes(self) -> Mapping[str, frozenset[str]]:
        return {
            "/v1/chat/completions": frozenset(fields.Chat.model_fields),
            "/v1/completions": frozenset(fields.Completion.model_fields),
            "/v1/responses": frozenset(fields.Response.model_fields),
            "/v1/embeddings": frozenset(fields.Embedding.model_fields),
        }

    def command(self, folder: Path) -> Command:
        return Command([], {}, self.address.rstrip("/").removesuffix("/v1"))

    def fits_without_max_tokens(self, answers: int, most: int) -> bool:
        """Return whether there is one answer: its length is left to the server's own limit, which may refuse a longer one."""
        return answers == 1 if not self.context else super().fits_without_max_tokens(answers, most)

    def context_in(self, health: Mapping[str, Any]) -> int:
        return context_of(health, {self.source.path})

    def outgoing(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        return body | {"model": self.source.path}

    async def prompt_ids(self, model: str, row: Mapping[str, Any]) -> list[int]:
        raise Unprovable("a server elsewhere does not show the tokens of a prompt")

    async def logprobs(self, model: str, prompt: Sequence[int], targets: Sequence[int]) -> list[float]:
        raise Unprovable("a server elsewhere does not tell log-probabilities of a prompt")


def check_address(address: str, allowed: Collection[str]) -> None:
    """Raises UserError if the address is not one that the operator allows, or would send data unencrypted."""
    parts = urlsplit(address)
    host = (parts.hostname or "").lower()
    try:
        port = parts.port
    except ValueError:
        port = None
    if parts.scheme not in ("http", "https") or not host or parts.username or parts.query or parts.fragment:
        raise UserError(Problem("--engine-url", "is no address of a server", "https://HOST[:PORT]/v1", address))
    if host in LOOPBACK:
        return
    if parts.scheme == "http" and f"http://{parts.netloc}".lower() not in allowed:
        fix = f"https://..., or --allow-engine http://{parts.netloc} where nobody else can listen"
        raise UserError(Problem("--engine-url", "keys and prompts would go in the clear", fix, address))
    if parts.scheme == "https" and host not in allowed and f"{host}:{port}" not in allowed:
        fix = f"--allow-engine {host}"
        raise UserError(Problem("--engine-url", "is not a server that --allow-engine names", fix, address))
