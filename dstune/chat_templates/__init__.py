"""Chat templates for base models that have none: `model.chat_template=chatml` instead of the path of a Jinja file.

Each is the format that the tuned models of a family speak, so its markers are tokens of the family's base models too.
A system message stands where that format has a place for it, else in front of the first message of the user.
"""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parent
NAMES = tuple(sorted(path.stem for path in FOLDER.glob("*.jinja")))


def template_path(value: str) -> Path:
    """The file of `model.chat_template`: a packaged template by its name, else the path that was given."""
    return FOLDER / f"{value}.jinja" if value in NAMES else Path(value)
