"""Fields that several kinds of objects have."""

from __future__ import annotations

from typing import TypeGuard

from dstune.serve.errors import ApiError

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


def invalid(param: str, expected: str) -> ApiError:
    return ApiError(400, f"Invalid {param}: must be {expected}.", param=param, code="invalid_value")
