"""The engine for GGUF files: llama.cpp's `llama-server`, started by its command line."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from dstune.checkpoint.gguf_header import matrix_types
from dstune.core.errors import Problem, UserError
from dstune.data.chat.content_format import reads_parts, with_joined_results
from dstune.data.message import joined
from dstune.data.template_date import freeze_date
from dstune.serve.engines.base import Command, Engine, Unprovable, overriding_arguments
from dstune.serve.engines.special import SpecialTexts
from dstune.serve.errors import ApiError
from dstune.serve.images import shows_image

_SAMPLING = frozenset(
    {"temperature", "top_p", "top_k", "min_p", "seed", "presence_penalty", "frequency_penalty", "logit_bias", "stop"}
    | {"stream", "stream_options", "user", "max_tokens"}
)
CHAT = _SAMPLING | {"model", "messages", "max_completion_tokens", "response_format", "safety_identifier"}
CHAT |= {"logprobs", "top_logprobs", "chat_template_kwargs"}
TOOLS = frozenset({"tools", "tool_choice"})
COMPLETION = _SAMPLING | {"model", "prompt"}

EXACT = frozenset({"F32", "F16", "BF16"})
"""Weight formats with a known error bound. All are computed with a key-value cache in fp16."""

OVERRIDES = frozenset(
    {"--chat-template", "--chat-template-file", "--chat-template-kwargs", "--override-kv", "--no-jinja"}
    | {"--temp", "--top-k", "--top-p", "--min-p", "--repeat-penalty", "--samplers"}
)
"""Arguments that replace settings of the export."""

MOST_SCORED = 16
"""How many targets of a row are compared; each takes one forward pass."""
FORCED = 1e6
"""Added to the logit of the token to be forced, whatever the model prefers."""


@dataclass
class LlamaCppEngine(Engine):
    name: ClassVar[str] = "llama.cpp"
    program: str | None = None
    arguments: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._special: SpecialTexts | None = None

    @property
    def routes(self) -> Mapping[str, frozenset[str]]:
        tools = TOOLS if "tools" in (self.source.template or "") else frozenset()
        return {"/v1/chat/completions": CHAT | tools, "/v1/completions": COMPLETION}

    @property
    def unseen_settings(self) -> str:
        return overriding_arguments(self.arguments, OVERRIDES)

    @property
    def file(self) -> Path:
        """Return the GGUF file in the model's folder. Raises UserError where the folder does not hold one GGUF file."""
        files = [] if self.source.folder is None else sorted(self.source.folder.glob("*.gguf"))
        if len(files) != 1:
            reason = f"holds {len(files)} GGUF files, one is served"
            raise UserError(Problem("MODEL", reason, "dstune export RUN --gguf", self.source.path))
        return files[0]

    def command(self, folder: Path) -> Command:
        program = self.program or shutil.which("llama-server")
        if program is None or not Path(program).is_file():
            reason = "there is no program `llama-server`"
            raise UserError(Problem("--engine-python", reason, "--engine-python /path/to/llama-server", program or ""))
        place = folder / "http.sock"  # the program recognizes a socket by this suffix
        options = ["--model", str(self.file), "--alias", self.base, "--host", str(place), "--jinja", "--no-webui"]
        # Its defaults truncate the distribution even if a request sets temperature 1 and top_p 1.
        options += ["--temp", "1", "--top-k", "0", "--top-p", "1", "--min-p", "0"]
        if self.source.template is not None:
            template = folder / "chat_template.jinja"
            template.write_text(freeze_date(self.source.template, self.source.template_date), encoding="utf-8")
            options += ["--chat-template-file", str(template)]
        return Command([program, *options, *self.arguments], os.environ, "http://engine", str(place))

    def learn(self) -> None:
        self._special = self._special or SpecialTexts.from_source(self.source)
        self.dtype = number_format(self.file)

    def outgoing(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        assert self._special is not None, "requests come after the start"
        self._special.refuse(body)
        request = {name: value for name, value in body.items() if name not in ("user", "safety_identifier")}
        if any(map(shows_image, request.get("messages", ()))):
            raise _unsupported("messages", "this engine reads no images; --engine local and --engine vllm do")
        if "messages" in request:
            request["messages"] = self._in_one_text(request["messages"])
        # Older versions do not know this name and would generate without a limit.
        most = request.pop("max_completion_tokens", None)
        if most is not None:
            request["max_tokens"] = most
        if request.get("logprobs"):  # the default is 20 alternatives, and 0 of them means no logprobs
            request["top_logprobs"] = max(request.get("top_logprobs", 0), 1)
        if "seed" in request:  # seeds have 32 bits, and -1 means a random one
            request["seed"] %= 2**31 - 1
        if isinstance(request.get("tool_choice"), dict):
            raise _unsupported(
                "tool_choice", "must be none, auto or required: llama.cpp lets the model choose a function"
            )
        prompt = request.get("prompt")
        if isinstance(prompt, list) and len(prompt) > 1 and not isinstance(prompt[0], int):
            raise _unsupported(
                "prompt", "must be one text or its token ids: llama.cpp counts the tokens of the first alone"
            )
        return request

    def _in_one_text(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return messages whose contents are single texts. Raises ApiError if the template would render parts differently:
        llama.cpp has its own rule for them."""
        messages = with_joined_results(messages)
        if not any(isinstance(message.get("content"), list) for message in messages):
            return messages
        if reads_parts(self.source.template or ""):
            raise _unsupported(
                "messages", "a content must be one text: this model's chat template reads parts in its own way"
            )
        return [joined(message) for message in messages]

    async def prompt_ids(self, model: str, row: Mapping[str, Any]) -> list[int]:
        text = row.get("text")
        if text is None:
            field_by_key = {"messages": "messages", "tools": "tools", "arguments": "chat_template_kwargs"}
            fields = {field: row[key] for key, field in field_by_key.items() if row.get(key)}
            try:
                fields["messages"] = self._in_one_text(fields.get("messages", []))
            except ApiError as error:
                raise Unprovable(f"a row of its reference cannot be asked: {error}") from None
            text = (await self.ask("POST", "/apply-template", fields))["prompt"]
        # As it does with a request: the begin of the text that its vocabulary asks for is taken from what the template has
        # printed, and put in front of the tokens.
        body = {"content": text, "add_special": True, "parse_special": True}
        ids: list[int] = (await self.ask("POST", "/tokenize", body))["tokens"]
        return ids

    async def logprobs(self, model: str, prompt: Sequence[int], targets: Sequence[int]) -> list[float]:
        """Return the log-probabilities of `targets` by forcing them one after the other: the engine reports no log-probabilities of
        a prompt, only those of tokens that it generates, before `logit_bias`. A token that is part of a character has none."""
        values: list[float] = []
        for number, target in enumerate(targets[:MOST_SCORED]):
            body = {"prompt": [*prompt, *targets[:number]], "n_predict": 1, "n_probs": 1, "temperature": 0}
            body |= {"logit_bias": [[target, FORCED]], "cache_prompt": True}
            completion_probabilities = (await self.ask("POST", "/completion", body)).get("completion_probabilities")
            if not completion_probabilities:
                break
            if completion_probabilities[0].get("id") != target or "logprob" not in completion_probabilities[0]:
                raise Unprovable(
                    "its tokens are those of the training; this version tells no log-probability of a token"
                )
            values.append(float(completion_probabilities[0]["logprob"]))
        return values


def _unsupported(field: str, reason: str) -> ApiError:
    return ApiError(400, f"Invalid {field}: {reason}.", param=field, code="unsupported_value")


def number_format(file: Path) -> str:
    """Return the number format whose bound applies to a GGUF file; if it has formats without a bound, their names. Raises UserError
    if it is not a GGUF file."""
    from gguf import GGMLQuantizationType

    try:
        kinds = {GGMLQuantizationType(kind).name for kind in matrix_types(file)}
    except (OSError, ValueError) as error:
        raise UserError(Problem("MODEL", f"is no GGUF file: {error}", "dstune export RUN --gguf", str(file))) from error
    if coarse := kinds - EXACT:
        return ", ".join(sorted(coarse))
    return "bfloat16" if "BF16" in kinds else "float16"
