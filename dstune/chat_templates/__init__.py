"""Chat templates for base models that have none: `model.chat_template=chatml` instead of the path of a Jinja file.

Each is the format that the tuned models of a family speak, so its markers are tokens of the family's base models too.
A system message stands where that format has a place for it, else in front of the first message of the user. What a
format has no tokens for (reasoning; tools in Gemma, Phi-3 and Phi-4) is written as text.

Prompts are templates without control tokens (`model.prompt_template=alpaca`).
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

FOLDER = Path(__file__).parent
PROMPTS = ("alpaca", "llama2", "vicuna")
NAMES = tuple(sorted({path.stem for path in FOLDER.glob("*.jinja")} - {*PROMPTS}))


def template_path(value: str) -> Path:
    """Return the file of `model.chat_template`: a packaged template by its name, else the path that was given."""
    return FOLDER / f"{value}.jinja" if value in NAMES else Path(value)


def prompt_path(name: str) -> Path:
    """Return the file of `model.prompt_template`, one of PROMPTS."""
    return FOLDER / f"{name}.jinja"


CONTROL_TOKENS = {
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "deepseek_r1": ("<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>"),  # noqa: RUF001
    "gemma": ("<start_of_turn>", "<end_of_turn>"),
    "gemma4": ("<|turn>", "<turn|>", "<|tool_response>"),
    "granite": ("<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>"),
    "gpt_oss": ("<|start|>", "<|message|>", "<|channel|>", "<|end|>", "<|return|>", "<|call|>"),
    "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "phi3": ("<|end|>", "<|user|>", "<|assistant|>", "<|system|>"),
    "phi4": ("<|im_start|>", "<|im_sep|>", "<|im_end|>"),
}
"""What a template prints around turns and each vocabulary must have as single tokens."""

OF_TOOLS = ("[AVAILABLE_TOOLS]", "[TOOL_CALLS]", "[TOOL_RESULTS]")
"""Mistral's tokens around tools, which its vocabularies have since version 2; `[INST]` was text before."""


def packaged_for(template: str, vocabulary: Collection[str]) -> str | None:
    """Return the packaged template that speaks in the control tokens of `template`, if the vocabulary has all of its own."""
    if "[INST]" in template and {*OF_TOOLS} <= {*vocabulary}:
        return "mistral" if "[INST] " in template else "mistral_tekken"
    fitting = [name for name, tokens in CONTROL_TOKENS.items() if {*tokens} <= {*vocabulary} and tokens[0] in template]
    return max(fitting, key=lambda name: len(CONTROL_TOKENS[name]), default=None)


def control_tokens(value: str | None) -> tuple[str, ...]:
    """Return control tokens of the packaged template `value`; those of a user's own Jinja file are not known."""
    return CONTROL_TOKENS.get(value or "", ())
