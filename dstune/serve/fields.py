"""Validates the bodies of requests that engines answer: what each field may hold, and which fields a route accepts.

Any other field is refused. A field that the engine would ignore is refused by name, unless its value has no effect (`n=1`,
`response_format={"type": "text"}`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Discriminator, Field, Tag, field_validator

from dstune.data.messages import NO_ARGUMENTS
from dstune.serve.errors import ApiError
from dstune.serve.messages import Conversations, Messages, Opened, ResponseInput, as_trained
from dstune.serve.validation import (
    INVALID,
    Body,
    Expected,
    FailsFast,
    Flag,
    NullsAreAbsent,
    Number,
    Text,
    Whole,
    place_of,
    read,
    tagged_by,
    words_of,
    wrong,
)

MOST_INPUTS = 2048
MOST_PROMPTS = 262_144
MOST_STOPS = 4
TEMPLATE_NAMES = NO_ARGUMENTS | {"documents"}
"""Template arguments that a client must not set."""

Label = Annotated[str, Text(256)]
Tokens = Annotated[int, Whole(1, 10_000_000)]
Seed = Annotated[int, Whole(-(2**63), 2**63 - 1)]
AnyObject = Annotated[dict[str, Any], Expected("must be an object")]

_StopText = Annotated[str, Field(min_length=1, max_length=256)]
Stop = Annotated[
    _StopText | Annotated[list[_StopText], Field(max_length=MOST_STOPS)],
    Expected(f"must be a text of 1 to 256 characters, or a list of at most {MOST_STOPS}"),
]
Bias = Annotated[
    dict[Annotated[str, Field(pattern=r"^[0-9]{1,9}$")], Annotated[float, Field(ge=-100, le=100)]],
    Field(max_length=1024),
    FailsFast,
    Expected("must be an object of at most 1024 token ids, each with a number from -100 to 100"),
]
_Filled = Annotated[str, Field(min_length=1)]
_Ids = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1), FailsFast]


def _kind_of_prompt(value: Any) -> str:
    if not isinstance(value, list) or not value:
        return "#text"
    return {str: "#texts", int: "#ids"}.get(type(value[0]), "#lists of ids")


Prompt = Annotated[
    Annotated[_Filled, Tag("#text")]
    | Annotated[list[_Filled], Field(max_length=MOST_PROMPTS), FailsFast, Tag("#texts")]
    | Annotated[_Ids, Field(max_length=MOST_PROMPTS), Tag("#ids")]
    | Annotated[list[_Ids], Field(max_length=MOST_PROMPTS), FailsFast, Tag("#lists of ids")],
    Discriminator(_kind_of_prompt),
    Expected("must be a text, token ids, or a list of these, none of them empty"),
]


def _check_text(value: str) -> str:
    if not value.strip():
        raise wrong("holds an empty text")
    return value


_Input = Annotated[str, AfterValidator(_check_text)]
Inputs = Annotated[
    _Input | Annotated[list[_Input], Field(min_length=1, max_length=MOST_INPUTS), FailsFast],
    Expected(f"must be a text that is not empty, or a list of 1 to {MOST_INPUTS}; token ids are not taken"),
]
_Words = _Input | Annotated[list[_Input], Field(min_length=1), FailsFast]
Words = Annotated[
    _Input | Annotated[list[_Words], Field(min_length=1, max_length=MOST_INPUTS), FailsFast],
    Expected(f"must be texts, or lists of words that are not empty, 1 to {MOST_INPUTS}"),
]


class Function(Body):
    name: Annotated[str, Field(pattern=r"^[\w-]{1,64}$"), Expected("must have 1 to 64 letters, digits, _ and -")]
    description: Any = None
    parameters: Annotated[dict[str, Any], Expected("must be a JSON schema")] = Field(default_factory=dict)
    strict: Any = None

    @field_validator("strict")
    @classmethod
    def _is_not_strict(cls, value: Any) -> Any:
        if value:
            raise wrong("cannot be true: arguments are not constrained to a schema here")
        return value


class Tool(Opened):
    type: Literal["function"]
    function: Function


class NamedFunction(Opened):
    name: str


class ChosenTool(Opened):
    type: Literal["function"]
    function: NamedFunction


class StreamOptions(Body):
    include_usage: Flag = False


class TextFormat(NullsAreAbsent):
    type: Literal["text"]


class ObjectFormat(NullsAreAbsent):
    type: Literal["json_object"]


class Schema(NullsAreAbsent):
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    name: Any = None
    description: Any = None
    strict: Any = None


class SchemaFormat(NullsAreAbsent):
    """Schemas for structured output. A schema anywhere else would work on one engine and be ignored by another."""

    type: Literal["json_schema"]
    json_schema: Schema


Format = Annotated[
    Annotated[TextFormat, Tag("#text")]
    | Annotated[ObjectFormat, Tag("#json_object")]
    | Annotated[SchemaFormat, Tag("#json_schema")],
    tagged_by("type"),
]


def _check_template_names(value: dict[str, Any]) -> dict[str, Any]:
    for name in value:
        if not re.fullmatch(r"[A-Za-z_]\w{0,63}", name):
            raise wrong(f"has a name that is none: {name[:60]!r}")
        if name in TEMPLATE_NAMES:
            raise wrong(f"{name!r} is not an argument of the template")
    return value


TemplateArguments = Annotated[
    dict[str, bool | int | float | Annotated[str, Field(max_length=1000)]],
    Field(max_length=16),
    Expected("must be an object of at most 16 arguments: true, false, numbers or short texts"),
    AfterValidator(_check_template_names),
]


class Request(Body):
    """The body of a request. A field that is absent or null is None."""

    conversation: ClassVar[str] = ""
    """The name of the field that holds messages."""
    required: ClassVar[tuple[str, ...]] = ()
    model: Label | None = None


class EncoderRequest(Request):
    user: Label | None = None


class Sampling(EncoderRequest):
    temperature: Annotated[float, Number(0, 2)] | None = None
    top_p: Annotated[float, Number(1e-6, 1)] | None = None
    top_k: Annotated[int, Whole(-1, 1_000_000)] | None = None
    min_p: Annotated[float, Number(0, 1)] | None = None
    seed: Seed | None = None
    presence_penalty: Annotated[float, Number(-2, 2)] | None = None
    frequency_penalty: Annotated[float, Number(-2, 2)] | None = None
    repetition_penalty: Annotated[float, Number(0.1, 10)] | None = None
    logit_bias: Bias | None = None
    stop: Stop | None = None
    n: Annotated[int, Whole(1, 128)] | None = None
    stream: Flag | None = None
    stream_options: StreamOptions | None = None
    return_token_ids: Flag | None = None
    max_tokens: Tokens | None = None


class Chat(Sampling):
    conversation = "messages"
    required = ("messages",)
    messages: Messages | None = None
    max_completion_tokens: Tokens | None = None
    logprobs: Flag | None = None
    top_logprobs: Annotated[int, Whole(0, 20)] | None = None
    tools: Annotated[list[Tool], Field(max_length=128), FailsFast] | None = None
    tool_choice: (
        Annotated[
            Literal["none", "auto", "required"] | ChosenTool, Expected("must be none, auto, required or a function")
        ]
        | None
    ) = None
    parallel_tool_calls: Flag | None = None
    response_format: Format | None = None
    chat_template_kwargs: TemplateArguments | None = None
    modalities: (
        Annotated[list[Literal["text"]], Field(min_length=1, max_length=1), Expected("must be ['text']")] | None
    ) = None
    store: Flag | None = None
    metadata: AnyObject | None = None
    reasoning_effort: Label | None = None
    verbosity: Label | None = None
    service_tier: Label | None = None
    safety_identifier: Label | None = None
    prompt_cache_key: Label | None = None


class Completion(Sampling):
    required = ("prompt",)
    prompt: Prompt | None = None
    logprobs: Annotated[int, Whole(0, 20)] | None = None
    echo: Flag | None = None
    best_of: Annotated[int, Whole(1, 128)] | None = None
    suffix: Annotated[str, Text(100_000)] | None = None


class Response(EncoderRequest):
    """The fields of `/v1/responses`, except those that refer to stored answers: none are stored."""

    conversation = "input"
    required = ("input",)
    input: ResponseInput | None = None
    instructions: Annotated[str, Text(1_000_000)] | None = None
    max_output_tokens: Tokens | None = None
    temperature: Annotated[float, Number(0, 2)] | None = None
    top_p: Annotated[float, Number(1e-6, 1)] | None = None
    stream: Flag | None = None
    store: Flag | None = None
    safety_identifier: Label | None = None
    metadata: AnyObject | None = None
    parallel_tool_calls: Flag | None = None
    service_tier: Label | None = None
    truncation: Annotated[Literal["auto", "disabled"], Expected("must be 'auto' or 'disabled'")] | None = None
    background: Flag | None = None


class Embedding(EncoderRequest):
    required = ("input",)
    input: Inputs | None = None
    encoding_format: Annotated[Literal["float", "base64"], Expected("must be 'float' or 'base64'")] | None = None
    dimensions: Annotated[int, Whole(1, 65536)] | None = None


class Classify(EncoderRequest):
    required = ("input",)
    input: Inputs | None = None


class Moderation(Request):
    required = ("input",)
    input: Inputs | None = None


class Tagging(EncoderRequest):
    required = ("input",)
    input: Words | None = None


class Rerank(EncoderRequest):
    required = ("query",)
    query: Annotated[str, Text(1_000_000)] | None = None
    documents: Inputs | None = None
    texts: Inputs | None = None
    top_n: Annotated[int, Whole(1, MOST_INPUTS)] | None = None
    return_documents: Flag | None = None
    return_text: Flag | None = None
    raw_scores: Flag | None = None


class Answer(EncoderRequest):
    required = ("question", "context")
    question: Inputs | None = None
    context: Inputs | None = None


class Reward(EncoderRequest):
    conversation = "messages"
    required = ("messages",)
    messages: Conversations | None = None


class Score(EncoderRequest):
    required = ("text_1", "text_2")
    text_1: Inputs | None = None
    text_2: Inputs | None = None


NEUTRAL: dict[str, Callable[[Any], bool]] = {
    "n": lambda value: value == 1,
    "best_of": lambda value: value == 1,
    "stream": lambda value: value is False,
    "echo": lambda value: value is False,
    "logprobs": lambda value: value is False,
    "logit_bias": lambda value: not value,
    "stop": lambda value: not value,
    "tools": lambda value: not value,
    "tool_choice": lambda value: value in ("auto", "none"),
    "parallel_tool_calls": lambda value: value is True,
    "response_format": lambda value: value.get("type") == "text",
    "presence_penalty": lambda value: value == 0,
    "frequency_penalty": lambda value: value == 0,
    "repetition_penalty": lambda value: value == 1,
    "top_k": lambda value: value in (0, -1),
    "min_p": lambda value: value == 0,
    "suffix": lambda value: not value,
    "modalities": lambda value: value == ["text"],
    "store": lambda value: value is False,
    "metadata": lambda value: not value,
    "service_tier": lambda value: value in ("auto", "default"),
    "truncation": lambda value: value == "disabled",
    "background": lambda value: value is False,
    "verbosity": lambda value: value == "medium",
    "reasoning_effort": lambda value: value == "none",
    "return_token_ids": lambda value: value is False,
    "chat_template_kwargs": lambda value: not value,
    "encoding_format": lambda value: value == "float",
    "return_documents": lambda value: value is False,
    "return_text": lambda value: value is False,
    "raw_scores": lambda value: value is False,
}
"""Values at which a field has no effect, so that any engine may ignore it."""


def checked(body: Mapping[str, Any], route: type[Request], supported: Collection[str]) -> dict[str, Any]:
    """Return `body` without fields that have no effect, and with its messages in the form of training. supported: the fields
    that the engine acts on. Raises ApiError for a field that is unknown or invalid, or that the engine would ignore."""
    model_fields = route.model_fields
    for name in body:
        if name not in model_fields:
            raise ApiError(400, f"Unknown field: {name[:80]!r}.", param=name[:80], code="unknown_parameter")
    read(route, body, _refusal)
    accepted: dict[str, Any] = {}
    for name, value in body.items():
        if value is None:
            continue
        if name in supported:
            accepted[name] = as_trained(value) if name == route.conversation else value
        elif not (name in NEUTRAL and NEUTRAL[name](value)):
            message = f"This model does not support {name!r} with this value."
            raise ApiError(400, message, param=name, code="unsupported_parameter")
    for name in route.required:
        if name not in accepted:
            raise ApiError(400, f"Missing required field: {name!r}.", param=name, code="missing_required_parameter")
    return accepted


def _refusal(mistake: Mapping[str, Any]) -> ApiError:
    name, *inside = mistake["loc"]
    reason = f"{place_of(tuple(inside))} {words_of(mistake)}".strip()
    return ApiError(400, f"Invalid {name}: {reason}.", param=str(name), code=INVALID)
