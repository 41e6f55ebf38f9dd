"""Names of tuned models: `ft:BASE:ORG:SUFFIX:ID`, and `ft:BASE:ORG:SUFFIX:ID:ckpt-step-N` of a checkpoint."""

from __future__ import annotations

import re
import secrets
import string

LETTERS = string.ascii_letters + string.digits
ID_LENGTH = 8
PREFIX = "ft:"


def slug(text: str | None) -> str:
    """Return text in the form of a name's part: lower case letters, digits and single hyphens, which replace all other
    characters."""
    return re.sub(r"[^a-z0-9]+", "-", (text or "").lower()).strip("-")[:64]


def new_name(base: str, organization: str, suffix: str | None, step: int | None = None) -> str:
    """Return an unused name: its id is one of 62^8 random ones."""
    random_id = "".join(secrets.choice(LETTERS) for _ in range(ID_LENGTH))
    ending = "" if step is None else f":ckpt-step-{step}"
    return f"{PREFIX}{base}:{slug(organization)}:{slug(suffix)}:{random_id}{ending}"
