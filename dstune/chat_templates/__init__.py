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


CONTROL_TOKENS = {
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "gemma": ("<start_of_turn>", "<end_of_turn>"),
    "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
}
"""What a template prints around turns and each vocabulary must have as single tokens."""


def control_tokens(value: str | None) -> tuple[str, ...]:
    """Control tokens of the packaged template `value`; those of a user's own Jinja file are not known."""
    return CONTROL_TOKENS.get(value or "", ())
