"""Model families for which some servers build prompts in code instead of with the chat template.

A run trains what its chat template renders, as transformers, llama.cpp and the local engine do. A server with code for a
family ignores the template, and its prompts may differ. docs/decisions/rendered-by-code.md lists what was compared.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

PAGE = "docs/decisions/rendered-by-code.md"


def note_of(template: str, messages: Iterable[Mapping[str, Any]]) -> str | None:
    """Return a note for a run whose rows contain `messages`; None if servers with code render them as `template` does."""
    roles = {message["role"] for message in messages}
    if "<|channel|>" in template and "<|start|>" in template and roles & {"system", "tool"}:
        return _note("vLLM renders gpt-oss by code (Harmony)", "a system text and the results of tools")
    if "\uff5cDSML\uff5c" in template and roles & {"tool"}:
        return _note("vLLM's tokenizer modes deepseek_v32 and deepseek_v4 render by code", "the tools")
    if "[TOOL_RESULTS]" in template and "tool" in roles:
        return _note("vLLM's tokenizer mode mistral renders by code (mistral-common)", "results that are no JSON")
    return None


def _note(server: str, text: str) -> str:
    return f"{server}, which may write {text} differently from the chat template that is trained: see {PAGE}"
