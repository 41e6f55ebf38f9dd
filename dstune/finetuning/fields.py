"""Fields that several kinds of objects have."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from difflib import get_close_matches
from typing import Any, TypeGuard

from dstune.serve.errors import ApiError
from dstune.serve.gateway.request import Request

MOST_PAIRS, MOST_KEY, MOST_VALUE = 16, 64, 512


def checked_metadata(value: object) -> dict[str, str] | None:
    """Raises ApiError for what is none."""
    if value is None:
        return None
    if not isinstance(value, dict) or len(value) > MOST_PAIRS:
        raise invalid("metadata", f"an object of at most {MOST_PAIRS} pairs")
    for name, text in value.items():
        if not is_text(name, MOST_KEY):
            raise invalid("metadata", f"pairs whose keys have 1 to {MOST_KEY} characters")
        if text != "" and not is_text(text, MOST_VALUE):
            raise invalid(f"metadata.{name}", f"a text of at most {MOST_VALUE} characters")
    return value


def is_text(value: object, most: int) -> TypeGuard[str]:
    """Whether it is a text of 1 to `most` characters: half of a surrogate pair is none, and PostgreSQL keeps no NUL."""
    if not isinstance(value, str) or not 0 < len(value) <= most:
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return "\0" not in value


def refuse_unknown(
    given: Mapping[str, Any], accepted: Collection[str], at: str = "", elsewhere: Mapping[str, str] | None = None
) -> None:
    """Refuse fields that nothing would act on, so that no setting of a client is dropped without a word.

    at: where `given` stands in the request. elsewhere: the places of fields that clients put here by mistake, by their names.
    Raises ApiError that names the first unknown field and the place that was probably meant."""
    unknown = sorted(set(map(str, given)) - set(accepted))
    if not unknown:
        return
    excerpt = unknown[0][:80]
    param = f"{at}.{excerpt}" if at else excerpt
    places = {name: f"{at}.{name}" if at else name for name in accepted} | dict(elsewhere or {})
    similar = [excerpt] if excerpt in places else get_close_matches(excerpt, places, n=1)
    if similar:
        hint = f"Did you mean {places[similar[0]]!r}?"
    else:
        hint = f"The fields here are {', '.join(accepted)}." if accepted else "There are no fields here."
    raise ApiError(400, f"Unknown field: {param!r}. {hint}", param=param, code="unknown_parameter")


async def refuse_body(request: Request) -> None:
    """Refuse fields in the body of a request that takes none; no body and an empty object are the same. Raises ApiError."""
    if request.header("content-length") not in ("", "0") or request.header("transfer-encoding"):
        refuse_unknown(await request.json(), ())


def invalid(param: str, expected: str) -> ApiError:
    return ApiError(400, f"Invalid {param}: must be {expected}.", param=param, code="invalid_value")
