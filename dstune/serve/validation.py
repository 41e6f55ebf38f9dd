"""Values of clients held against pydantic's models, and the first mistake in the API's words: the one place that does it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Annotated, Any, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    FailFast,
    Field,
    GetCoreSchemaHandler,
    TypeAdapter,
    ValidationError,
    model_validator,
)
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from dstune.config.names import nearest
from dstune.core.errors import Problem
from dstune.serve.errors import ApiError

Loc = tuple[int | str, ...]
INVALID = "invalid_value"
"""The type of pydantic's errors whose text is meant for clients."""


CLOSED = ConfigDict(extra="forbid", hide_input_in_errors=True, protected_namespaces=())
"""There are no other fields."""


class Body(BaseModel):
    """An object that a client sends: nothing in it is converted."""

    model_config = ConfigDict(**CLOSED, strict=True)


class NullsAreAbsent(Body):
    """One in which null stands for a field that was left out, whether it is known or not: clients send back what they got."""

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, value: Any) -> Any:
        return {name: item for name, item in value.items() if item is not None} if isinstance(value, dict) else value


class Expected:
    """What a value must be, in words that stand in the place of all that pydantic says of it."""

    def __init__(self, words: str):
        self.words = words

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.custom_error_schema(
            handler(source), custom_error_type=INVALID, custom_error_message=self.words
        )


class _Bounded(Expected):
    """pydantic's bounds of a value, and what it must be in words."""

    def __init__(self, words: str, **bounds: Any):
        super().__init__(words)
        self._bounds = bounds

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        bounded = handler.generate_schema(Annotated[source, Field(**self._bounds)])
        return core_schema.custom_error_schema(bounded, custom_error_type=INVALID, custom_error_message=self.words)


def Number(least: float, most: float) -> Expected:
    return _Bounded(f"must be a number from {least:g} to {most:g}", ge=least, le=most, strict=True)


def Whole(least: int, most: int) -> Expected:
    return _Bounded(f"must be a whole number from {least} to {most}", ge=least, le=most, strict=True)


def Text(most: int, least: int = 0) -> Expected:
    size = f"{least} to {most}" if least else f"at most {most}"
    return _Bounded(f"must be a text of {size} characters", min_length=least, max_length=most, strict=True)


Flag = Annotated[bool, Expected("must be true or false")]


class _FailFast(FailFast):
    """pydantic's, which members of a union can have: those are hashed."""

    __hash__ = object.__hash__


FailsFast = _FailFast()
"""A list of a million wrong values is one mistake."""


def tagged_by(name: str) -> Discriminator:
    """Return what an object is, by one of its fields: members of the union have the tags `#VALUE`."""

    def tag_of(value: Any) -> str:
        return f"#{value.get(name) if isinstance(value, dict) else None}"

    return Discriminator(tag_of)


def wrong(words: str) -> PydanticCustomError:
    """Return an error that a validator raises. words: what is wrong, after the name of the value."""
    return PydanticCustomError(INVALID, "{words}", {"words": words})


ModelT = TypeVar("ModelT", bound=BaseModel)
T = TypeVar("T")
Refusal = Callable[[Mapping[str, Any]], ApiError]


def read(model: type[ModelT], value: Any, refusal: Refusal) -> ModelT:
    """Return what `value` says. refusal: of a mistake as pydantic describes it. Raises ApiError for the first mistake."""
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise refusal(first_error(error)) from None


def first_error(error: ValidationError) -> Mapping[str, Any]:
    return error.errors(include_url=False)[0]


# -- files


def read_tree(cls: type[T], value: Any, where: str, keys: Collection[str] = ()) -> tuple[T | None, list[Problem]]:
    """Return what a file of an operator says, as a (pydantic) class; or None, and all that is wrong. where: before the names of
    keys. keys: among which a misspelled one is looked for."""
    try:
        return TypeAdapter(cls).validate_python(value), []
    except ValidationError as error:
        return None, [_problem(mistake, where, keys) for mistake in error.errors(include_url=False)]


def _problem(mistake: Mapping[str, Any], where: str, keys: Collection[str]) -> Problem:
    near, reason = "", words_of(mistake)
    if mistake["type"] in _UNKNOWN_KEY and mistake["loc"]:
        near, reason = nearest(str(mistake["loc"][-1]), list(keys)) or "", "there is no such key"
    value = "" if mistake["type"] == "missing" else str(mistake["input"])[:200]
    place = f"{where}{place_of(mistake['loc'])}".rstrip(".: ")
    return Problem(place, reason, f"did you mean {near}?" if near else "", value)


_UNKNOWN_KEY = ("extra_forbidden", "unexpected_keyword_argument")

# -- words

WORDS: Mapping[str, str] = {
    "extra_forbidden": "is an unknown field",
    "missing": "is missing",
    "unexpected_keyword_argument": "there is no such key",
    "string_type": "must be a text",
    "int_type": "must be a whole number",
    "float_type": "must be a number",
    "bool_type": "must be true or false",
    "tuple_type": "must be a list",
    "dataclass_type": "must be a mapping",
    "mapping_type": "must be a mapping",
    "literal_error": "must be {expected}",
    "greater_than": "must be above {gt:g}",
    "greater_than_equal": "must be at least {ge:g}",
    "less_than_equal": "must be at most {le:g}",
    "list_type": "must be a list",
    "dict_type": "must be an object",
    "model_type": "must be an object",
    "model_attributes_type": "must be an object",
    "too_short": "must not be empty",
    "string_too_short": "must not be empty",
    "too_long": "must have at most {max_length} members",
}
"""What is wrong, by pydantic's types of mistakes."""


def words_of(mistake: Mapping[str, Any]) -> str:
    """Return what is wrong with a value, after its name."""
    kind, context = mistake["type"], mistake.get("ctx", {})
    if kind == "union_tag_invalid":
        return f"has the unknown type or role {context['tag'][1:41]!r}; there are {context['expected_tags'].replace('#', '')}"
    return WORDS[kind].format(**context) if kind in WORDS else str(mistake["msg"])


def place_of(loc: Loc) -> str:
    """Return a place as clients know it: `messages[3].content`."""
    visible = (part for part in loc if not str(part).startswith("#"))
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in visible).lstrip(".")
