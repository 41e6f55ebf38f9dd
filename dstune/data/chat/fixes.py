"""Find the settings that fix a conversation for its chat template, by trying them."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

from dstune.chat_templates import packaged_for, template_path
from dstune.data.chat.probe import SWITCHES
from dstune.data.chat.rule import RuleError, Stops, turn_of
from dstune.data.chat.template import ChatTemplate, Messages, RenderError, Tools
from dstune.data.chat.thoughts import is_open
from dstune.data.chat.turn_parts import has_reasoning, without_reasoning
from dstune.data.message import content_text


class TemplateFixes:
    """Finds fixes for conversations that a template refuses or prints in part; picklable.

    All methods return the fixes as parts of a message to the user.
    """

    def __init__(self, template: ChatTemplate):
        self._template = template
        self.packaged = packaged_for(
            template.source(None), [token.content for token in template.tokenizer.added_tokens_decoder.values()]
        )
        """Name of the packaged template for the model's family; None if there is none."""

    def of_refusal(self, messages: Messages, tools: Tools | None, arguments: Mapping[str, Any]) -> list[str]:
        """Return fixes for a conversation that the template refuses: move the system text, or use the packaged template."""
        fixes = []
        first, *other_messages = messages
        if first["role"] == "system" and other_messages and isinstance(other_messages[0].get("content"), str):
            joined = {
                **other_messages[0],
                "content": f"{content_text(first['content'])}\n\n{other_messages[0]['content']}",
            }
            with suppress(RenderError):
                self._template.text([joined, *other_messages[1:]], tools=tools, arguments=arguments)
                fixes.append("it takes the conversation with the system text at the beginning of the first question")
        return [*fixes, *self.by_packaged(messages, tools, arguments)]

    def by_packaged(self, messages: Messages, tools: Tools | None, arguments: Mapping[str, Any]) -> list[str]:
        """Return the setting of the packaged template if that one prints everything the assistant says, and the last of `messages`
        directly after its prompt."""
        if self.packaged is None:
            return []
        source = template_path(self.packaged).read_text(encoding="utf-8")
        packaged = ChatTemplate(self._template.tokenizer, self._template.date, self._template.arguments, source)
        try:
            begin = packaged.text(messages[:-1], tools=tools, arguments=arguments, prompt=True)
            whole = packaged.text(messages, tools=tools, arguments=arguments)
        except RenderError:
            return []
        answers = (
            content_text(message.get("content")).strip() for message in messages if message["role"] == "assistant"
        )
        prints_all = whole.startswith(begin) and all(answer in whole for answer in answers)
        return [f"model.chat_template={self.packaged} fixes it"] if prints_all else []

    def of_turn(
        self, messages: Messages, tools: Tools | None, arguments: Mapping[str, Any], prompt: str, stops: Stops
    ) -> list[str]:
        """Return fixes for a last message whose text does not continue its prompt, or has no end.

        prompt: as rendered. stops: the texts that end a turn.
        """
        fixes = [*self._of_end(messages, tools, arguments, prompt, stops)]
        if is_open(prompt) and not has_reasoning(messages[-1]):
            fixes.append("the prompt asks for reasoning, which this turn does not have: give it as reasoning_content")
        source = self._template.source(tools)
        changes: dict[str, tuple[Messages, dict[str, Any]]] = {
            f"task.chat_template_kwargs={{{name}: {str(value).lower()}}} fixes it": (messages, {name: value})
            for name in SWITCHES
            for value in (True, False)
            if name in source
        }
        if any(map(has_reasoning, messages)):
            changes["task.reasoning=drop fixes it"] = [without_reasoning(message) for message in messages], {}
        for fix, (changed_messages, changed_arguments) in changes.items():
            options: dict[str, Any] = {"tools": tools, "arguments": {**arguments, **changed_arguments}}
            try:
                begin = self._template.text(changed_messages[:-1], prompt=True, **options)
                whole = self._template.text(changed_messages, **options)
            except RenderError:
                continue
            with suppress(RuleError):
                turn_of(len(messages) - 1, begin, whole, stops, calls=bool(messages[-1].get("tool_calls")))
                fixes.append(fix)
        return [*fixes, *self.by_packaged(messages, tools, arguments)]

    def _of_end(
        self, messages: Messages, tools: Tools | None, arguments: Mapping[str, Any], prompt: str, stops: Stops
    ) -> list[str]:
        """Return the token to name in the model's generation settings, if its text is a turn with calls that ends with one at which
        no server stops (Gemma 4)."""
        calls = messages[-1].get("tool_calls") or []
        text = self._template.text(messages, tools=tools, arguments=arguments)
        added = self._template.tokenizer.added_tokens_decoder
        at_end = [number for number, token in added.items() if token.content and text.rstrip().endswith(token.content)]
        if len(calls) != 1 or not at_end or not text.startswith(prompt):
            return []
        number = max(at_end, key=lambda number: len(added[number].content))
        stopping = replace(stops, tokens=stops.tokens | {added[number].content})
        with suppress(RuleError):
            turn_of(len(messages) - 1, prompt, text, stopping, calls=True)
            token = added[number].content
            reason = "so that servers stop there"
            return [f"add the id {number} of {token} to eos_token_id in the model's generation_config.json, {reason}"]
        return []
