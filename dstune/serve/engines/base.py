"""The interface between the gateway and an engine."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from dstune.core.child_python import SAFE_PATH
from dstune.core.errors import DstuneError, Problem, UserError, from_json
from dstune.serve.asgi import dumps
from dstune.serve.engines.http import FAILURES, Upstream
from dstune.serve.source import Source

GUARD = Path(__file__).with_name("guard.py")

HEALTH_SECONDS = 10.0
ASK_SECONDS = 600.0
"""Limit of requests that the gateway itself sends to an engine."""


class EngineDown(Exception):
    """The engine does not run or does not answer."""


class EngineFault(EngineDown):
    """The engine answered that it failed to handle the request."""


class Unprovable(Exception):
    """The engine lacks a route that the parity check needs; the text names it."""


@dataclass(frozen=True)
class Command:
    """How to start an engine's process."""

    argv: list[str]
    env: Mapping[str, str]
    url: str
    """The address of its HTTP server."""
    socket: str | None = None
    stdin: bytes = b""
    """Settings for a dstune program, which ends when its standard input closes; a program that does not read standard input runs
    under `guard.py`."""


@dataclass
class Limits:
    """Limits of an engine. A kind of engine ignores those it does not support."""

    max_sequences: int = 16
    max_waiting: int = 64
    max_cached_tokens: int = 65536
    threads: int = 0
    drain_seconds: int = 20
    start_seconds: float = 600.0


@dataclass
class Engine:
    """One base model (or one full model) with its adapters. Subclasses define how the process starts and what its routes accept."""

    name: ClassVar[str]
    starts_process: ClassVar[bool] = True
    reads_images: ClassVar[bool] = False
    """Whether messages may contain images, if the model accepts them."""
    knows_clients: ClassVar[bool] = False
    """Whether requests name their client (`client`), so that the engine can schedule clients in turn."""

    source: Source
    """The model that it serves: the base, or a full model."""
    base: str
    """The name under which the base is served."""
    state_dir: Path
    """Where logs are written: a folder that only this user can read."""
    runtime_dir: Path
    """Where sockets are created (mode 0700): socket paths must be short."""
    limits: Limits
    client: Upstream | None = None
    process: subprocess.Popen[bytes] | None = None
    dtype: str = ""
    context: int = 0
    starts: int = 0
    _folder: Path | None = field(default=None, repr=False)

    # -- what subclasses define

    @property
    def routes(self) -> Mapping[str, frozenset[str]]:
        """Paths that it serves, each with the request fields that it acts on."""
        raise NotImplementedError

    @property
    def unseen_settings(self) -> str:
        """Settings outside the exported files that affect answers and are not compared with them; empty if there are none."""
        return ""

    def command(self, folder: Path) -> Command:
        """Return the command that starts the engine. folder: an empty folder for this start."""
        raise NotImplementedError

    def expect(self, adapter: Source) -> None:
        """Announce an adapter that will be loaded. Called before the start."""

    def learn(self) -> None:
        """Read the properties of the model that requests depend on. Called in a thread once the engine is healthy. Raises UserError
        if they cannot be determined."""

    health: ClassVar[str] = "/health"
    health_seconds: ClassVar[float] = 2.0
    """Interval of health checks for a server that dstune did not start."""

    async def prompt_ids(self, model: str, row: Mapping[str, Any]) -> list[int]:
        """Return the tokens of the prompt that `row` holds as `messages` (with `tools`, `arguments`) or `text`.

        Raises Unprovable, EngineDown.
        """
        if "messages" not in row:
            body = {"model": model, "prompt": row["text"]}
        else:
            body = {"model": model, "messages": row["messages"], "add_generation_prompt": True}
            if row.get("tools"):
                body["tools"] = row["tools"]
            if row.get("arguments"):
                body["chat_template_kwargs"] = row["arguments"]
        answer = await self.ask("POST", "/tokenize", body)
        ids: list[int] = answer["tokens"]
        return ids

    async def logprobs(self, model: str, prompt: Sequence[int], targets: Sequence[int]) -> list[float]:
        """Return the log-probabilities of `targets` after `prompt`: all of them, or as many of the first ones as the engine
        reports. Raises Unprovable, EngineDown."""
        ids = [*prompt, *targets]
        body = {"model": model, "prompt": ids, "max_tokens": 1, "temperature": 0, "prompt_logprobs": 0}
        answer = await self.ask("POST", "/v1/completions", body)
        return prompt_logprobs(answer["choices"][0].get("prompt_logprobs"), ids)[-len(targets) :]

    async def logprobs_with_images(self, model: str, row: Mapping[str, Any]) -> list[float]:
        """Return the log-probabilities of a reference row's `target_ids` after its `prompt_ids`, with the images of its `messages`:
        all of them, or as many of the first ones as the engine reports. Called only on engines that read images. Raises Unprovable,
        EngineDown."""
        raise NotImplementedError

    async def answers(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return the tokens of an encoder's rows and the answers to them. Raises Unprovable."""
        raise Unprovable(f"{self.name} does not show the tokens of an encoder")

    def fits_without_max_tokens(self, answers: int, most: int) -> bool:
        """Return whether `answers` answers to a request without `max_tokens` cannot exceed `most` tokens together."""
        return 0 < answers * self.context <= most

    def outgoing(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """Return a checked request in the form that the engine expects. Raises ApiError if the engine must not see it."""
        return body

    async def load_adapter(self, name: str, folder: Path) -> None:
        """Load an adapter under `name`. Raises UserError if the engine refuses it, or was started without adapters."""
        try:
            await self.ask("POST", "/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(folder)})
        except Unprovable as error:
            reason = f"{error}, so no adapter can be added to it"
            fix = "start it with --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"
            raise UserError(Problem("--engine-url", reason, fix)) from None

    async def unload_adapter(self, name: str) -> None:
        await self.ask("POST", "/v1/unload_lora_adapter", {"lora_name": name})

    async def replace_adapter(self, name: str, folder: Path) -> None:
        """Replace the adapter served as `name`. Running requests finish with the previous one; the gateway sends no new ones
        meanwhile. Raises what `load_adapter` raises."""
        await self.unload_adapter(name)
        await self.load_adapter(name, folder)

    # -- the process

    async def start(self) -> None:
        """Start the process and wait until it is healthy. Raises EngineDown if it does not become healthy, UserError if it reports
        a user's mistake."""
        self._folder = self.runtime_dir / secrets.token_hex(6)
        self._folder.mkdir(mode=0o700)
        command = self.command(self._folder)
        self.starts += 1
        self.context = 0
        self.client = Upstream(command.url, command.socket, self.headers)
        if self.starts_process:
            self._spawn(command)
        deadline = time.monotonic() + self.limits.start_seconds
        while not await self._healthy():
            if self.process is not None and self.process.poll() is not None:
                raise self._failure()
            if time.monotonic() > deadline:
                await self.stop(0)
                place = f"see {self.log}" if self.starts_process else f"it should answer under {command.url}"
                raise EngineDown(f"{self.name} did not become ready in {self.limits.start_seconds:g} s; {place}")
            await asyncio.sleep(0.1)
        try:
            await asyncio.to_thread(self.learn)
        except BaseException:
            await self.stop(0)
            raise

    @property
    def headers(self) -> dict[str, str]:
        return {}

    @property
    def log(self) -> Path:
        return self.state_dir / "logs" / f"{self.name}.log"

    @property
    def start_error_file(self) -> Path:
        """Where its process writes the reason why it could not start."""
        assert self._folder is not None
        return self._folder / "error.json"

    def _spawn(self, command: Command) -> None:
        self.log.parent.mkdir(mode=0o700, exist_ok=True)
        argv = command.argv if command.stdin else [sys.executable, "-I", str(GUARD), *command.argv]
        descriptor = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o600)
        with os.fdopen(descriptor, "wb") as stream:
            self.process = subprocess.Popen(
                argv,
                env={**command.env, **SAFE_PATH},
                stdin=subprocess.PIPE,
                stdout=stream,
                stderr=stream,
                start_new_session=True,
            )
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(command.stdin)
            self.process.stdin.flush()

    async def _healthy(self) -> bool:
        try:
            async with asyncio.timeout(HEALTH_SECONDS):
                answer = await self.ask("GET", self.health, None)
        except (EngineDown, Unprovable, TimeoutError):
            return False
        self.dtype = str(answer.get("dtype", self.dtype))
        self.context = self.context_in(answer)
        return True

    def context_in(self, health: Mapping[str, Any]) -> int:
        """Return the context length (prompt and answer, in tokens) that a health response states; the known one if it states
        none."""
        return int(health.get("context", self.context))

    def _failure(self) -> DstuneError | EngineDown:
        with contextlib.suppress(OSError, ValueError, KeyError):
            return from_json(self.start_error_file.read_text(encoding="utf-8"))
        assert self.process is not None
        tail = self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-5:]
        text = "\n    ".join(
            [f"{self.name} ended with {self.process.returncode}; the last lines of {self.log}:", *tail]
        )
        return EngineDown(text)

    def alive(self) -> bool:
        return not self.starts_process or (self.process is not None and self.process.poll() is None)

    async def ended(self) -> None:
        """Wait until the process has ended. For a server that dstune did not start, wait until two health checks in a row fail: it
        may come back with another model, and without the loaded adapters."""
        failed_checks = 0
        while self.alive() and failed_checks < 2:
            await asyncio.sleep(0.1 if self.starts_process else self.health_seconds)
            if not self.starts_process:
                failed_checks = 0 if await self._still_answers() else failed_checks + 1

    async def _still_answers(self) -> bool:
        """Return whether an external server still answers as it did at the start."""
        try:
            return await self._healthy()
        except UserError:  # it answers, even if with a refusal
            return True

    async def stop(self, patience: float) -> None:
        """Stop the process: SIGTERM, then SIGKILL to its whole session after `patience` seconds."""
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            deadline = time.monotonic() + patience
            while self.process.poll() is None and time.monotonic() < deadline:
                await asyncio.sleep(0.05)
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            if self.process.stdin is not None:
                with contextlib.suppress(OSError):
                    self.process.stdin.close()
            self.process = None
        if self.client is not None:
            await self.client.close()
            self.client = None
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    # -- HTTP

    async def ask(self, method: str, path: str, body: Any) -> dict[str, Any]:
        """Return the JSON answer. Raises EngineDown; Unprovable if there is no such route; UserError for a 400, and for a 404 that
        names a missing model or adapter folder."""
        if self.client is None:
            raise EngineDown(f"{self.name} is not running")
        try:
            async with asyncio.timeout(ASK_SECONDS):
                status, content = await self.client.ask(method, path, None if body is None else dumps(body))
        except FAILURES as error:
            raise EngineDown(f"{self.name} does not answer: {error or type(error).__name__}") from error
        if status == 404 and _names_missing_object(content):
            raise UserError(Problem(self.name, f"does not find what {path} needs: {_message(content)}"))
        if status in (404, 405, 501):
            raise Unprovable(f"{self.name} has no {method} {path}")
        if 400 <= status < 500:
            raise UserError(Problem(self.name, f"refuses {path}: {_message(content)}"))
        if status != 200:
            is_from_proxy = status in (502, 503, 504)
            raise (EngineDown if is_from_proxy else EngineFault)(f"{self.name} answers {path} with {status}")
        value = _value(content)
        return value if isinstance(value, dict) else {}


def prompt_logprobs(entries: Any, ids: Sequence[int]) -> list[float]:
    """Return the log-probabilities of all tokens of a prompt but the first. entries: `prompt_logprobs` of vLLM's API, one entry
    a token. Raises Unprovable if the engine sent none."""
    if not entries:
        raise Unprovable("the engine does not report log-probabilities of prompts")
    return [float(entry[str(token)]["logprob"]) for entry, token in zip(entries[1:], ids[1:], strict=True)]


def overriding_arguments(words: Sequence[str], flags: Collection[str]) -> str:
    """Return which of `flags` the user passed to the engine, as text; empty if none."""
    used = [flag for word in words if (flag := word.partition("=")[0]) in flags]
    return f"in place of the export's files: {', '.join(used)}" if used else ""


def context_of(models: Mapping[str, Any], names: Collection[str]) -> int:
    """Return the longest context of the models `names` in a `/v1/models` response, if the server states it (vLLM does); else 0."""
    listed = models.get("data")
    lengths = [
        model["max_model_len"]
        for model in (listed if isinstance(listed, list) else [])
        if isinstance(model, dict) and model.get("id") in names and type(model.get("max_model_len")) is int
    ]
    return max(lengths, default=0)


def _value(content: bytes) -> Any:
    """Parse JSON; None if `content` is not JSON."""
    try:
        return json.loads(content)
    except ValueError:
        return None


def _names_missing_object(content: bytes) -> bool:
    """Return whether a 404 says what is missing: for an unknown route, servers answer "Not Found" alone."""
    value = _value(content)
    error = value.get("error", value) if isinstance(value, dict) else None
    message = error.get("message") if isinstance(error, dict) else None
    return isinstance(message, str) and not message.lower().rstrip(".").endswith("not found")


def _message(content: bytes) -> str:
    value = _value(content)
    if not isinstance(value, dict):
        return content.decode("utf-8", "replace")[:500]
    error = value.get("error", value)
    return str(error.get("message", error.get("detail", error)) if isinstance(error, dict) else error)[:500]
