"""Fields shared by several kinds of objects."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from difflib import get_close_matches
from typing import Annotated, Any, TypeGuard, TypeVar

from pydantic import AfterValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from dstune.serve import validation
from dstune.serve.errors import ApiError
from dstune.serve.gateway.request import Request
from dstune.serve.validation import INVALID, Expected, words_of, wrong

MOST_PAIRS, MOST_KEY, MOST_VALUE = 16, 64, 512
UNKNOWN = "unknown_parameter"


class Body(validation.Body):
    """The JSON object of a request, or one inside it. Null means an absent field."""

    model_config = ConfigDict(extra="ignore")  # pydantic would name an unknown field, but not suggest the right place

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown(cls, value: Any) -> Any:
        """Refuse unknown fields, so that no setting of a client is ignored silently."""
        if isinstance(value, dict) and (unknown := set(map(str, value)) - cls.accepted(value)):
            accepted = sorted(cls.accepted(value))
            raise PydanticCustomError(UNKNOWN, "is unknown", {"name": min(unknown), "accepted": accepted})
        return value

    @classmethod
    def accepted(cls, value: Mapping[str, Any]) -> set[str]:
        """Return the field names that this object accepts."""
        return set(cls.model_fields)


class IdText(Expected):
    """A text of 1 to `most` characters that every supported database can store."""

    def __init__(self, most: int):
        super().__init__(f"must be a text of 1 to {most} characters")
        self._most = most

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        def check(value: str) -> str:
            if not is_text(value, self._most):
                raise wrong(self.words)
            return value

        return super().__get_pydantic_core_schema__(Annotated[source, AfterValidator(check)], handler.generate_schema)


BodyT = TypeVar("BodyT", bound=Body)


def read_body(model: type[BodyT], value: Mapping[str, Any], elsewhere: Mapping[str, str] | None = None) -> BodyT:
    """Validate a request's fields. elsewhere: the right place of fields that clients often send at the wrong level, by name. Raises
    ApiError for the first mistake."""
    return validation.read(model, value, lambda mistake: _refusal(mistake, elsewhere or {}))


def _refusal(mistake: Mapping[str, Any], elsewhere: Mapping[str, str]) -> ApiError:
    param = ".".join(str(part) for part in mistake["loc"] if not str(part).startswith("#"))
    if mistake["type"] == UNKNOWN:
        return _unknown(mistake["ctx"]["name"], mistake["ctx"]["accepted"], param, elsewhere)
    if mistake["type"] == "missing" or mistake["input"] is None:
        return ApiError(400, f"Missing required parameter: '{param}'.", param=param, code="missing_required_parameter")
    return ApiError(400, f"Invalid {param}: {words_of(mistake)}.", param=param, code=INVALID)


def _check_metadata(value: dict[str, str]) -> dict[str, str]:
    for name, text in value.items():
        if not is_text(name, MOST_KEY):
            raise wrong(f"must be pairs whose keys have 1 to {MOST_KEY} characters")
        if text and not is_text(text, MOST_VALUE):
            raise wrong(f"must be pairs whose values have at most {MOST_VALUE} characters")
    return value


Metadata = Annotated[dict[str, str], Field(max_length=MOST_PAIRS), AfterValidator(_check_metadata)]


def is_text(value: object, most: int) -> TypeGuard[str]:
    """Return whether `value` is a text of 1 to `most` characters that can be stored: half a surrogate pair cannot, nor a NUL in
    PostgreSQL."""
    if not isinstance(value, str) or not 0 < len(value) <= most:
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return "\0" not in value


def refuse_unknown(
    value: Mapping[str, Any], accepted: Collection[str], at: str = "", elsewhere: Mapping[str, str] | None = None
) -> None:
    """Refuse unknown fields, so that no setting of a client is ignored silently. at: the place of `value` in the request.
    elsewhere: the right place of fields that clients often put here by mistake, by name. Raises ApiError that names the first
    unknown field and the place that was probably meant."""
    unknown = sorted(set(map(str, value)) - set(accepted))
    if unknown:
        raise _unknown(unknown[0], accepted, at, elsewhere or {})


def _unknown(name: str, accepted: Collection[str], at: str, elsewhere: Mapping[str, str]) -> ApiError:
    excerpt = name[:80]
    param = f"{at}.{excerpt}" if at else excerpt
    places = {accepted_name: f"{at}.{accepted_name}" if at else accepted_name for accepted_name in accepted} | dict(
        elsewhere
    )
    similar = [excerpt] if excerpt in places else get_close_matches(excerpt, places, n=1)
    if similar:
        hint = f"Did you mean {places[similar[0]]!r}?"
    else:
        hint = f"The fields here are {', '.join(accepted)}." if accepted else "There are no fields here."
    return ApiError(400, f"Unknown field: {param!r}. {hint}", param=param, code=UNKNOWN)


async def refuse_body(request: Request) -> None:
    """Refuse fields in the body of a request that takes none; an empty object is accepted. Raises ApiError."""
    if request.header("content-length") not in ("", "0") or request.header("transfer-encoding"):
        refuse_unknown(await request.json(), ())


def invalid(param: str, expected: str) -> ApiError:
    return ApiError(400, f"Invalid {param}: must be {expected}.", param=param, code="invalid_value")
