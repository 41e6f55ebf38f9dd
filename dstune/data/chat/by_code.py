"""Families whose prompts some servers make by code and not by the chat template, and what differs then.

A run trains what its chat template renders, as transformers, llama.cpp and the local engine do. Where a server has code for a
family, it ignores the template. docs/decisions/rendered-by-code.md has what was compared.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

PAGE = "docs/decisions/rendered-by-code.md"


def note_of(template: str, messages: Iterable[Mapping[str, Any]]) -> str | None:
    """Return what to tell a run whose rows have `messages`, or nothing where servers with code render them as `template` does."""
    roles = {message["role"] for message in messages}
    if "<|channel|>" in template and "<|start|>" in template and roles & {"system", "tool"}:
        return _note("vLLM renders gpt-oss by code (Harmony)", "a system text and the results of tools")
    if "\uff5cDSML\uff5c" in template and roles & {"tool"}:
        return _note("vLLM's tokenizer modes deepseek_v32 and deepseek_v4 render by code", "the tools")
    if "[TOOL_RESULTS]" in template and "tool" in roles:
        return _note("vLLM's tokenizer mode mistral renders by code (mistral-common)", "results that are no JSON")
    return None


def _note(server: str, text: str) -> str:
    return f"{server}, which may write {text} otherwise than the chat template that is trained: see {PAGE}"
