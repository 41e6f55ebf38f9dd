"""The keys of `task=seq2seq`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dstune.config.fields import setting
from dstune.protocols.task import TaskConfig


@dataclass(frozen=True)
class Seq2SeqConfig(TaskConfig):
    """A target for a source (translation, summary), by encoder-decoders and by decoders; the loss is on the target."""

    name: str = "seq2seq"
    prompt: str = "{source}"
    """What the model reads, with `{source}` in it: `"Translate to Spanish: {source}"`."""
    chat: bool = True
    """Use the chat template of a decoder, if it has one. Otherwise the target follows the prompt and `separator`."""
    separator: str = "\n"
    """Text between prompt and target if a decoder gets its prompt without a chat template."""
    template_date: str | None = setting(None, example="2026-01-31")
    """The date that a chat template may print (`YYYY-MM-DD`); frozen to the day of composition when not given."""
    chat_template_kwargs: dict[str, Any] = setting({})
    """Arguments of the chat template, for example `{enable_thinking: false}`; a row's own come before them."""
    max_target_length: int | None = setting(None, at_least=2)
    """Longest target in tokens, its end included; `data.max_length` when not given. Longer ones are cut."""
    max_new_tokens: int | None = setting(None, at_least=1)
    """Longest generated target; when not given a quarter more than the longest target among the evaluated rows."""
