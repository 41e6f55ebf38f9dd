"""Messages in the form of the API's routes, and their conversion to the form of training."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Discriminator, Field, Tag, model_validator

from dstune.core.parsing import parse_json
from dstune.serve.gateway.json_bounds import MOST_MEMBERS, members_in
from dstune.serve.images import is_image, problem_of_address
from dstune.serve.validation import Body, Expected, FailsFast, NullsAreAbsent, Text, tagged_by, wrong

MOST_MESSAGES = 2048
MOST_CONVERSATIONS = 64

Name = Annotated[str, Text(1_000_000)]


class Opened(Body):
    """An object whose unknown fields are ignored."""

    model_config = ConfigDict(extra="ignore")


class TextPart(Body):
    type: Literal["text"]
    text: str
    refusal: Any = None


class RefusalPart(Body):
    type: Literal["refusal"]
    refusal: str
    text: Any = None


def _check_image(url: str) -> str:
    if problem := problem_of_address(url):
        raise wrong(problem)
    return url


ImageUrl = Annotated[str, AfterValidator(_check_image)]
Detail = Annotated[
    Literal["auto", "high"],
    Expected("must be 'auto' or 'high': the model's processor chooses the size, as in training"),
]


class ImageAddress(Body):
    url: ImageUrl
    detail: Detail | None = None


class ImagePart(Body):
    type: Literal["image_url"]
    image_url: ImageAddress


Part = Annotated[Annotated[TextPart, Tag("#text")] | Annotated[RefusalPart, Tag("#refusal")], tagged_by("type")]


def _kind_of_content(value: Any) -> str:
    return "#parts" if isinstance(value, list) else "#plain"


Content = Annotated[
    Annotated[str, Tag("#plain")] | Annotated[list[Part], Field(max_length=MOST_MESSAGES), FailsFast, Tag("#parts")],
    Discriminator(_kind_of_content),
]
SeenPart = Annotated[
    Annotated[TextPart, Tag("#text")]
    | Annotated[RefusalPart, Tag("#refusal")]
    | Annotated[ImagePart, Tag("#image_url")],
    tagged_by("type"),
]
SeenContent = Annotated[
    Annotated[str, Tag("#plain")]
    | Annotated[list[SeenPart], Field(max_length=MOST_MESSAGES), FailsFast, Tag("#parts")],
    Discriminator(_kind_of_content),
]
"""The content of a message that may contain images: models read images but write none."""


def _check_arguments(value: str) -> str:
    try:
        is_object = isinstance(parse_json(value or "{}"), dict)
    except ValueError:
        is_object = False
    if not is_object:
        raise wrong("must be the JSON text of an object")
    return value


class CalledFunction(Opened):
    name: str
    arguments: Annotated[str, AfterValidator(_check_arguments)]


class Call(Opened):
    function: CalledFunction


class _Message(NullsAreAbsent):
    content: SeenContent
    name: Name | None = None


class SystemMessage(_Message):
    role: Literal["system"]


class DeveloperMessage(_Message):
    role: Literal["developer"]


class UserMessage(_Message):
    role: Literal["user"]


class ToolMessage(_Message):
    role: Literal["tool"]
    tool_call_id: Name | None = None


class AssistantMessage(NullsAreAbsent):
    role: Literal["assistant"]
    content: Content | None = None
    name: Name | None = None
    tool_calls: Annotated[list[Call], Field(min_length=1, max_length=128), FailsFast] | None = None
    refusal: Name | None = None
    reasoning_content: Name | None = None

    @model_validator(mode="after")
    def _says_one_thing(self) -> AssistantMessage:
        if self.refusal and self.content:
            raise wrong("has a content and a refusal")
        if self.content is None and not (self.tool_calls or self.refusal):
            raise wrong("needs content")
        return self


def _bound_arguments(value: Any) -> Any:
    """Bound arguments before they are parsed, since a parser creates an object for each bracket."""
    members = 0
    for message in value if isinstance(value, list) else ():
        members += sum(map(members_in, _arguments_of(message)))
        if members > MOST_MEMBERS:
            raise wrong(f"tool calls hold more than {MOST_MEMBERS:,} objects, lists and members")
    return value


def _arguments_of(message: Any) -> Iterator[bytes]:
    """Yield the JSON texts of a message's tool calls; the message is not validated yet."""
    calls = message.get("tool_calls") if isinstance(message, dict) else None
    for call in calls if isinstance(calls, list) else ():
        function = call.get("function") if isinstance(call, dict) else None
        if isinstance(function, dict) and isinstance(function.get("arguments"), str):
            yield function["arguments"].encode("utf-8", "replace")


Message = Annotated[
    Annotated[SystemMessage, Tag("#system")]
    | Annotated[DeveloperMessage, Tag("#developer")]
    | Annotated[UserMessage, Tag("#user")]
    | Annotated[AssistantMessage, Tag("#assistant")]
    | Annotated[ToolMessage, Tag("#tool")],
    tagged_by("role"),
]
Messages = Annotated[
    list[Message],
    Field(min_length=1, max_length=MOST_MESSAGES),
    FailsFast,
    BeforeValidator(_bound_arguments),
]


def _kind_of_conversations(value: Any) -> str:
    return "#many" if isinstance(value, list) and value and all(isinstance(row, list) for row in value) else "#single"


Conversations = Annotated[
    Annotated[Messages, Tag("#single")]
    | Annotated[list[Messages], Field(max_length=MOST_CONVERSATIONS), FailsFast, Tag("#many")],
    Discriminator(_kind_of_conversations),
]
"""Messages, or a list of such lists."""


class InputText(Body):
    type: Literal["input_text", "output_text"]
    text: str
    annotations: Any = None
    logprobs: Any = None


class InputImage(NullsAreAbsent):
    type: Literal["input_image"]
    file_id: Annotated[None, Expected("names a file, and none is kept: send the image itself as image_url")] = None
    image_url: ImageUrl
    detail: Detail | None = None


InputPart = Annotated[
    Annotated[InputText, Tag("#input_text")]
    | Annotated[InputText, Tag("#output_text")]
    | Annotated[InputImage, Tag("#input_image")],
    tagged_by("type"),
]


class InputMessage(NullsAreAbsent):
    """A message of `/v1/responses`, or an earlier output item."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        Annotated[str, Tag("#plain")]
        | Annotated[list[InputPart], Field(max_length=MOST_MESSAGES), FailsFast, Tag("#parts")],
        Discriminator(_kind_of_content),
    ]
    id: Name | None = None
    status: Name | None = None

    @model_validator(mode="after")
    def _writes_no_image(self) -> InputMessage:
        if self.role == "assistant" and any(isinstance(part, InputImage) for part in self.content):
            raise wrong("of the assistant shows an image: models see images and write none")
        return self


ResponseInput = Annotated[
    Annotated[str, Field(min_length=1), Tag("#plain")]
    | Annotated[list[InputMessage], Field(min_length=1, max_length=MOST_MESSAGES), FailsFast, Tag("#parts")],
    Discriminator(_kind_of_content),
]


# -- in the form of training


def as_trained(value: Any) -> Any:
    """Return messages in the form of training rows. A content of one part becomes a text; several parts stay parts, since templates
    print them in their own way. A refusal becomes the content, since engines do not know refusals."""
    if not isinstance(value, list):
        return value
    return [as_trained(item) if isinstance(item, list) else _message_as_trained(item) for item in value]


def _message_as_trained(message: dict[str, Any]) -> dict[str, Any]:
    content, refusal = message.get("content"), message.get("refusal")
    if isinstance(content, list):
        parts = [_part_as_trained(part) for part in content]
        is_text = len(parts) < 2 and not any(map(is_image, parts))
        content = "".join(part["text"] for part in parts) if is_text else parts
    trained = {name: value for name, value in message.items() if name != "refusal"}
    if refusal or "content" in message:
        trained["content"] = refusal or content
    if message.get("tool_calls"):
        trained["tool_calls"] = [_with_arguments(call) for call in message["tool_calls"]]
    return trained


def _part_as_trained(part: dict[str, Any]) -> dict[str, Any]:
    if is_image(part):
        return part
    return {"type": _PART_TYPES.get(part["type"], "text"), "text": part.get(part["type"], part.get("text"))}


def _with_arguments(call: dict[str, Any]) -> dict[str, Any]:
    """Return a call that has arguments: clients that assemble a stream send "" for a call without any."""
    function = call["function"]
    return call if function["arguments"] else call | {"function": function | {"arguments": "{}"}}


_PART_TYPES = {name: name for name in ("input_text", "output_text")}
"""Part types of `/v1/responses`; all others become `text`."""
