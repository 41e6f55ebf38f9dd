"""Validates clients' values with pydantic models, and reports the first mistake in the API's words."""

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
"""The type of pydantic errors whose text is shown to clients."""


CLOSED = ConfigDict(extra="forbid", hide_input_in_errors=True, protected_namespaces=())
"""Unknown fields are refused."""


class Body(BaseModel):
    """An object from a client. Its values are not converted."""

    model_config = ConfigDict(**CLOSED, strict=True)


class NullsAreAbsent(Body):
    """An object in which null means an absent field, known or not: clients send back what they received."""

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, value: Any) -> Any:
        return {name: item for name, item in value.items() if item is not None} if isinstance(value, dict) else value


class Expected:
    """The requirement on a value, in words that replace pydantic's own messages."""

    def __init__(self, words: str):
        self.words = words

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.custom_error_schema(
            handler(source), custom_error_type=INVALID, custom_error_message=self.words
        )


class _Bounded(Expected):
    """pydantic's bounds of a value, with the requirement in words."""

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
    """pydantic's FailFast made hashable, which members of a union need."""

    __hash__ = object.__hash__


FailsFast = _FailFast()
"""Stops at the first mistake of a list: a million wrong values count as one."""


def tagged_by(name: str) -> Discriminator:
    """Return a discriminator that reads one field of an object: members of the union have the tags `#VALUE`."""

    def tag_of(value: Any) -> str:
        return f"#{value.get(name) if isinstance(value, dict) else None}"

    return Discriminator(tag_of)


def wrong(words: str) -> PydanticCustomError:
    """Return the error for a validator to raise. words: what is wrong, to follow the value's name."""
    return PydanticCustomError(INVALID, "{words}", {"words": words})


ModelT = TypeVar("ModelT", bound=BaseModel)
T = TypeVar("T")
Refusal = Callable[[Mapping[str, Any]], ApiError]


def read(model: type[ModelT], value: Any, refusal: Refusal) -> ModelT:
    """Validate `value` as `model` and return it. refusal: makes the error from a mistake that pydantic describes. Raises ApiError
    for the first mistake."""
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise refusal(first_error(error)) from None


def first_error(error: ValidationError) -> Mapping[str, Any]:
    return error.errors(include_url=False)[0]


# -- files


def read_tree(cls: type[T], value: Any, where: str, keys: Collection[str] = ()) -> tuple[T | None, list[Problem]]:
    """Validate an operator's file as a pydantic class. Returns the object, or None and all problems. where: prefix of the names of
    keys. keys: candidates for correcting misspelled keys."""
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
"""What is wrong, by pydantic's types of errors."""


def words_of(mistake: Mapping[str, Any]) -> str:
    """Return what is wrong with a value, to follow its name."""
    kind, context = mistake["type"], mistake.get("ctx", {})
    if kind == "union_tag_invalid":
        return f"has the unknown type or role {context['tag'][1:41]!r}; there are {context['expected_tags'].replace('#', '')}"
    return WORDS[kind].format(**context) if kind in WORDS else str(mistake["msg"])


def place_of(loc: Loc) -> str:
    """Return a location as clients write it: `messages[3].content`."""
    visible = (part for part in loc if not str(part).startswith("#"))
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in visible).lstrip(".")
