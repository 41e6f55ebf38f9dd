"""Serves with vLLM, in a separate Python environment: starts it by its command line, or uses a running server.

dstune talks to vLLM by HTTP alone and imports none of its modules, since they move between releases. docs/serving.md describes what
vLLM does with adapters, templates and dates.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from dstune.core.errors import Problem, UserError
from dstune.core.parsing import object_in, read_object
from dstune.data.chat.content_format import reads_parts, with_joined_results
from dstune.data.template_date import freeze_date
from dstune.serve.engines.base import (
    HEALTH_SECONDS,
    Command,
    Engine,
    EngineDown,
    Unprovable,
    context_of,
    overriding_arguments,
    prompt_logprobs,
)
from dstune.serve.engines.special import SpecialTexts, hub_folder
from dstune.serve.images import is_image, shows_image
from dstune.serve.source import Source

_SAMPLING = frozenset(
    {"temperature", "top_p", "top_k", "min_p", "seed", "presence_penalty", "frequency_penalty", "repetition_penalty"}
    | {"logit_bias", "stop", "n", "stream", "stream_options", "user", "max_tokens", "logprobs", "return_token_ids"}
    | {"response_format"}
)
CHAT = _SAMPLING | {"model", "messages", "max_completion_tokens", "top_logprobs", "chat_template_kwargs"}
CHAT |= {"safety_identifier"}
TOOLS = frozenset({"tools", "tool_choice"})
COMPLETION = _SAMPLING | {"model", "prompt", "echo"}
RESPONSE = frozenset({"model", "input", "instructions", "max_output_tokens", "temperature", "top_p", "stream", "user"})
RESPONSE |= {"safety_identifier"}
ENCODER_ROUTES: Mapping[str, Mapping[str, frozenset[str]]] = {
    "embed": {
        "/v1/embeddings": frozenset({"model", "input", "encoding_format", "dimensions", "user"}),
        "/rerank": frozenset({"model", "query", "documents", "top_n", "user"}),
        "/score": frozenset({"model", "text_1", "text_2", "user"}),
    },
    "classify": {"/classify": frozenset({"model", "input", "user"})},
    "rank": {
        "/rerank": frozenset({"model", "query", "documents", "top_n", "user"}),
        "/score": frozenset({"model", "text_1", "text_2", "user"}),
    },
    "tag": {},
    "answer": {},
    "reward": {},
}
"""Routes, with the request fields that they act on, for each kind of answer that an encoder serves (`Source.serves`)."""
PARSERS = (("<tool_call>", "hermes"), ("[TOOL_CALLS]", "mistral"), ("<|python_tag|>", "llama3_json"))
"""How templates mark a tool call, and vLLM's name of the parser for it."""

DTYPES = {"auto": "", "half": "float16", "float": "float32"}
"""vLLM's aliases of number formats; `auto` stands for the stored format."""

OVERRIDES = frozenset(
    {"--chat-template", "--default-chat-template-kwargs", "--tokenizer", "--tokenizer-mode", "--tokenizer-revision"}
    | {"--generation-config", "--override-generation-config", "--hf-overrides", "--hf-config-path"}
)
"""Arguments that replace settings of the export."""

CONTENT_FORMAT = "--chat-template-content-format"

LEAST_RANK = 16
"""The smallest value passed as `--max-lora-rank`."""
_PYTHON_ENVIRONMENT = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
"""Variables of dstune's own Python, which vLLM's process does not inherit."""


@dataclass
class VllmEngine(Engine):
    """A vLLM server."""

    name: ClassVar[str] = "vllm"
    reads_images: ClassVar[bool] = True
    python: str | None = None
    """The Python of vLLM's environment; None for a server that already runs at `address`."""
    address: str | None = None
    key: str = ""
    """The API key of a server that already runs."""
    arguments: list[str] = field(default_factory=list)
    """The user's arguments, which come last on the command line."""
    number_format: str = ""
    max_rank: int = 0
    """The largest rank of the adapters that will be loaded; 0 without adapters."""

    def __post_init__(self) -> None:
        self.starts_process = self.address is None  # type: ignore[misc]
        self._special: SpecialTexts | None = None
        self._loaded: set[str] = set()
        self._places: dict[str, Any] = {}

    @property
    def headers(self) -> dict[str, str]:
        return {"authorization": f"Bearer {self.key}"} if self.key else {}

    @cached_property
    def parser(self) -> str:
        """The name of vLLM's tool call parser; empty if the template shows none."""
        if parser := self._user_argument("--tool-call-parser"):
            return parser
        template = self.source.template or ""
        return next((name for mark, name in PARSERS if mark in template and "tools" in template), "")

    @cached_property
    def routes(self) -> Mapping[str, frozenset[str]]:
        if self.source.generates:
            chat = CHAT | (TOOLS if self.parser else set())
            return {"/v1/chat/completions": chat, "/v1/completions": COMPLETION, "/v1/responses": RESPONSE}
        return {path: fields for kind in self.source.serves for path, fields in ENCODER_ROUTES[kind].items()}

    @property
    def unseen_settings(self) -> str:
        if self.address is not None:
            return "compared by rows alone: the server has its own template, tokenizer and generation settings"
        return overriding_arguments(self.arguments, OVERRIDES)

    def expect(self, adapter: Source) -> None:
        self.max_rank = max(self.max_rank, _rank(adapter.folder), LEAST_RANK)

    def command(self, folder: Path) -> Command:
        if self.address is not None:
            return Command([], {}, self.address.removesuffix("/").removesuffix("/v1"))
        assert self.python is not None
        program = Path(self.python).parent / "vllm"
        if not program.is_file():
            fix = "name the Python of an environment in which `pip install vllm` was run"
            raise UserError(Problem("--engine-python", "there is no program `vllm` in its folder", fix, self.python))
        source = self.source
        options = ["serve", source.load_from, "--uds", str(folder / "http"), "--served-model-name", self.base]
        if source.load_revision:
            options += ["--revision", source.load_revision]
        if source.prompted_as is not None:
            options += ["--tokenizer", str(source.prompted_as)]
        template = source.template
        if template is not None and source.generates:
            file = folder / "chat_template.jinja"
            file.write_text(freeze_date(template, source.template_date), encoding="utf-8")
            options += ["--chat-template", str(file)]
            if not self._user_argument(CONTENT_FORMAT):  # vLLM's versions judge macros differently
                options += [CONTENT_FORMAT, "openai" if reads_parts(template) else "string"]
        if self.number_format:
            options += ["--dtype", self.number_format]
        if self.max_rank:
            options += ["--enable-lora", "--max-lora-rank", str(self.max_rank)]
        if self.parser and "--tool-call-parser" not in self.arguments:
            options += ["--enable-auto-tool-choice", "--tool-call-parser", self.parser]
        if source.trust_remote_code:
            options.append("--trust-remote-code")
        options += ["--shutdown-timeout", str(self.limits.drain_seconds)]
        environment = {name: value for name, value in os.environ.items() if name not in _PYTHON_ENVIRONMENT}
        environment |= {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "VLLM_NO_USAGE_STATS": "1"}
        argv = [str(program), *options, *self.arguments]
        return Command(argv, environment, "http://engine", str(folder / "http"))

    def learn(self) -> None:
        """Determine the number format and the control tokens, which vLLM does not report. The model is in the hub's cache by
        now."""
        dtype_name = self._user_argument("--dtype") or self.number_format
        self.dtype = DTYPES.get(dtype_name, dtype_name) or self._stored_dtype()
        if not self.dtype:
            reason = (
                f"the configuration of {self.source.load_from} is not on this machine, so its number format is unknown"
            )
            raise UserError(Problem("--dtype", reason, "--dtype bfloat16, if vLLM computes in it", self.source.path))
        self._special = self._special or SpecialTexts.from_source(self.source)

    async def _healthy(self) -> bool:
        healthy = await super()._healthy()
        if healthy and not self.context:
            with contextlib.suppress(EngineDown, Unprovable):
                self.context = context_of(await self.ask("GET", "/v1/models", None), {self.base})
        return healthy

    async def start(self) -> None:
        self._loaded, self._places = set(), {}
        await super().start()

    async def _still_answers(self) -> bool:
        """Return whether the engine is still the server that was proven: a replacement at its address is healthy as well, but lacks
        the adapters or has others under their names."""
        if not await super()._still_answers():
            return False
        try:
            async with asyncio.timeout(HEALTH_SECONDS):
                listed = (await self.ask("GET", "/v1/models", None))["data"]
            places = {model["id"]: model.get("root") for model in listed if model["id"] in self._loaded}
        except (EngineDown, Unprovable, UserError, TimeoutError, LookupError, TypeError, AttributeError):
            return True  # it does not list its models
        place_by_name = {name: place for name, place in self._places.items() if name in self._loaded}
        self._places = places | place_by_name
        return all(name in places and places[name] == place for name, place in place_by_name.items())

    def outgoing(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        assert self._special is not None, "requests come after the start"
        self._special.refuse(body)
        request = {name: value for name, value in body.items() if name not in ("user", "safety_identifier")}
        if isinstance(body.get("messages"), list):
            request["messages"] = _as_trained(body["messages"])
        if path != "/v1/responses":
            return request
        # vLLM would store an answer under an id that any client may request.
        return request | {"input": _with_details(request["input"]), "store": False}

    async def prompt_ids(self, model: str, row: Mapping[str, Any]) -> list[int]:
        request = {**row, "messages": _as_trained(row["messages"])} if "messages" in row else row
        if not any(map(shows_image, request.get("messages", ()))):
            return await super().prompt_ids(model, request)
        # `/tokenize` may omit the tokens that stand for images in the model.
        rendered = await self._rendered(model, request, add_generation_prompt=True)
        ids: list[int] | None = rendered.get("prompt_token_ids")
        if ids is None:
            raise Unprovable(
                "this version of vLLM does not report the tokens of a prompt with images (return_token_ids)"
            )
        return ids

    async def logprobs_with_images(self, model: str, row: Mapping[str, Any]) -> list[float]:
        """Return log-probabilities as `Engine` defines them. vLLM scores a conversation with images only as messages, with the
        trained answer as the start of a turn to be continued. If its template renders other tokens than training did, such as an
        end of turn, it returns none."""
        if "answer" not in row:
            return []
        answered = [*_as_trained(row["messages"]), {"role": "assistant", "content": row["answer"]}]
        fields = {"add_generation_prompt": False, "continue_final_message": True, "prompt_logprobs": 0}
        rendered = await self._rendered(model, {**row, "messages": answered}, **fields)
        ids: list[int] = rendered.get("prompt_token_ids") or []
        row_ids = [*row["prompt_ids"], *row["target_ids"]]
        equal_count = sum(itertools.takewhile(bool, map(int.__eq__, ids, row_ids)))
        if equal_count <= len(row["prompt_ids"]):
            return []
        return prompt_logprobs(rendered.get("prompt_logprobs"), ids)[len(row["prompt_ids"]) - 1 : equal_count - 1]

    async def _rendered(self, model: str, row: Mapping[str, Any], **fields: Any) -> dict[str, Any]:
        """Return vLLM's response about the prompt that it renders from a row's messages."""
        body = {
            "model": model,
            "messages": row["messages"],
            "max_tokens": 1,
            "temperature": 0,
            "return_token_ids": True,
        }
        extra_fields = {"tools": row.get("tools"), "chat_template_kwargs": row.get("arguments")}
        body |= {name: value for name, value in extra_fields.items() if value} | fields
        return await self.ask("POST", "/v1/chat/completions", body)

    async def load_adapter(self, name: str, folder: Path) -> None:
        max_rank = int(self._user_argument("--max-lora-rank") or self.max_rank)
        if self.address is None and (rank := _rank(folder)) > max_rank:
            reason = f"its rank is {rank}, but the engine was started for ranks up to {max_rank}"
            raise UserError(Problem(name, reason, f"start it with `-- --enable-lora --max-lora-rank {rank}`"))
        if self.address is not None:
            # A running server may still have an adapter of this name, of another version, from an earlier gateway.
            with contextlib.suppress(UserError, Unprovable):
                await self.unload_adapter(name)
        await super().load_adapter(name, folder)
        self._loaded.add(name)
        self._places.pop(name, None)

    async def unload_adapter(self, name: str) -> None:
        self._loaded.discard(name)
        await super().unload_adapter(name)

    def _user_argument(self, flag: str) -> str:
        """Return the value of `flag` in the user's arguments; empty if it is not among them."""
        for index, word in enumerate(self.arguments):
            if word == flag and index + 1 < len(self.arguments):
                return self.arguments[index + 1]
            if word.startswith(f"{flag}="):
                return word.partition("=")[2]
        return ""

    def _stored_dtype(self) -> str:
        """Return the number format in which vLLM computes: the stored one, or bf16 if that is fp32."""
        folder = hub_folder(self.source)
        config = None if folder is None else read_object(folder / "config.json")
        if config is None:
            return ""
        stored = str(config.get("dtype") or config.get("torch_dtype") or "float32")
        return "bfloat16" if stored == "float32" else stored


def _as_trained(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return `messages` in the form in which vLLM renders what was trained: the reasoning of earlier answers under the name that it
    reads (it silently ignores `reasoning_content`), and the texts of a tool's result joined, which its versions before 0.20 give to
    the template as a list."""
    return [
        {**message, "reasoning": message["reasoning_content"]}
        if isinstance(message, dict) and message.get("reasoning_content") and "reasoning" not in message
        else message
        for message in with_joined_results(messages)
    ]


def _with_details(request_input: Any) -> Any:
    """Return the input of `/v1/responses` with a `detail` for each image, without which vLLM refuses it."""
    if not isinstance(request_input, list):
        return request_input
    return [
        {**item, "content": [{"detail": "auto", **part} if is_image(part) else part for part in item["content"]]}
        if shows_image(item)
        else item
        for item in request_input
    ]


def _rank(folder: Path | None) -> int:
    """Return the largest rank of an adapter."""
    assert folder is not None
    settings = object_in(folder / "adapter_config.json")
    return max([int(settings.get("r") or 0), *map(int, (settings.get("rank_pattern") or {}).values())])
