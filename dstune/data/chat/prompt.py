"""Build the prompt of a conversation in tokens, up to where the assistant speaks next: the same in training and in every answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

from dstune.data.chat.call_ids import with_call_ids
from dstune.data.chat.dropped import refuse_unprinted_parts
from dstune.data.chat.probe import Facts, facts_of
from dstune.data.chat.template import ChatTemplate, Messages, Tools
from dstune.data.control import ControlTokens


def prompt_ids(
    template: ChatTemplate,
    control: ControlTokens,
    facts: Facts,
    messages: Messages,
    *,
    tools: Tools | None = None,
    arguments: Mapping[str, Any] | None = None,
    most: int | None = None,
    place_images: Callable[[str], str] | None = None,
) -> list[int]:
    """Return the token ids of `messages` and of the generation prompt. Text in messages, tools and template arguments stays text,
    even if it reads like the end of a turn.

    most: limit of the prompt, in tokens. place_images: inserts the placeholders of images into the rendered text
    (`images.expand`). Raises RenderError, also if the template does not print the parts of a content, and TooManyTokens if the
    prompt is certainly longer than `most`.
    """
    values = dict(arguments or {})
    refuse_unprinted_parts(template, facts, messages, tools, values)
    defused = control.defuse({"messages": messages, "tools": tools, "arguments": list(values.values())})
    written = defused.value
    text = template.text(
        [facts.adapted(message) for message in with_call_ids(written["messages"], facts.call_ids)],
        tools=written["tools"],
        arguments=dict(zip(values, written["arguments"], strict=True)),
        prompt=True,
    )
    if place_images is not None:
        text = place_images(text)
    # The template prints the special tokens itself; the tokenizer would double the first one.
    restored, control_starts = defused.restore(text)
    if most is not None:
        control.check_length(restored, most)
    return control.encode(restored, control_starts)[0]


class ChatPrompts:
    """Builds the prompts of a model that answers; its template has the arguments of the training built in.

    date: the date that the template uses as today.
    """

    def __init__(self, tokenizer: Any, date: str | None):
        self.template = ChatTemplate(tokenizer, date)
        self._control = ControlTokens(tokenizer)

    @cached_property
    def _facts(self) -> Facts:
        with self.template.opening():
            return facts_of(self.template)

    def ids(
        self,
        messages: Messages,
        *,
        tools: Tools | None = None,
        arguments: Mapping[str, Any] | None = None,
        most: int | None = None,
        place_images: Callable[[str], str] | None = None,
    ) -> list[int]:
        """Return the token ids of `messages` and of the generation prompt. Raises RenderError, and TooManyTokens if there are
        certainly more than `most`."""
        parts = (self.template, self._control, self._facts)
        return prompt_ids(*parts, messages, tools=tools, arguments=arguments, most=most, place_images=place_images)
