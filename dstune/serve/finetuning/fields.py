"""Fields that several kinds of objects have."""

from __future__ import annotations

from dstune.serve.errors import ApiError

MOST_PAIRS, MOST_KEY, MOST_VALUE = 16, 64, 512


def checked_metadata(value: object, param: str = "metadata") -> dict[str, str] | None:
    """Raises ApiError for what is none."""
    if value is None:
        return None
    if not isinstance(value, dict) or len(value) > MOST_PAIRS:
        raise ApiError(400, f"Invalid {param}: must be an object of at most {MOST_PAIRS} pairs.", param=param)
    for name, text in value.items():
        if not 0 < len(name) <= MOST_KEY or not _is_text(name):
            raise ApiError(400, f"Invalid {param}: a key has 1 to {MOST_KEY} characters.", param=param)
        if not isinstance(text, str) or len(text) > MOST_VALUE or not _is_text(text):
            at = f"{param}.{name}"
            raise ApiError(400, f"Invalid {at}: must be a text of at most {MOST_VALUE} characters.", param=at)
    return value


def _is_text(text: str) -> bool:
    """Half of a surrogate pair is none, and PostgreSQL keeps no NUL."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return "\0" not in text
