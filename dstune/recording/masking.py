"""Masks secrets and personal data in texts of users."""

from __future__ import annotations

from collections.abc import Callable, Sequence


def make_redactor(kinds: Sequence[str]) -> Callable[[str], str] | None:
    """Return what masks a text; None if `kinds` is empty. Raises UserError for a missing package."""
    if not kinds:
        return None
    from dstune.data.clean import sensitive

    if "personal_data" in kinds:
        sensitive.check_personal_data()
    if "secrets" in kinds:
        sensitive.find_secrets("")

    def redact(text: str) -> str:
        if "secrets" in kinds:
            text = sensitive.mask(text, sensitive.find_secrets(text))
        if "personal_data" in kinds:
            text = sensitive.mask(text, sensitive.find_personal_data(text))
        return text

    return redact
