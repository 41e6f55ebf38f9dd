"""Render conversations with the model's chat template and find which characters are trained (the rule is in `chat.rule`).

The text of a passage is tokenized once, in one piece; the tokenizer's offsets turn spans of characters into a token mask.
Content that the template does not print cannot be trained, so a row that holds such content is refused (`chat.probe`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from dstune.chat_templates import template_path
from dstune.config.architectures import marked_stops
from dstune.core.errors import Problem, UserError
from dstune.data.chat.by_code import note_of
from dstune.data.chat.call_ids import with_call_ids
from dstune.data.chat.content_format import as_template_reads
from dstune.data.chat.dropped import dropped_fields, refuse_unprinted_messages, refuse_unprinted_parts
from dstune.data.chat.fixes import TemplateFixes
from dstune.data.chat.inline_reasoning import InlineReasoning
from dstune.data.chat.probe import Facts, facts_of, learn_stops, reasoning_of
from dstune.data.chat.prompt import prompt_ids
from dstune.data.chat.rule import (
    Passage,
    Place,
    RuleError,
    Span,
    Stops,
    Turn,
    alternatives,
    in_common,
    only_marked,
    passages,
    place_in,
    turn_of,
)
from dstune.data.chat.targets import require_offsets
from dstune.data.chat.template import ChatTemplate, Messages, RenderError, TemplateRefusal, Tools
from dstune.data.chat.turn_parts import (
    Render,
    has_reasoning,
    text_behind_prompt,
    unprinted_part,
    without_reasoning,
)
from dstune.data.control import ControlTokens
from dstune.data.message import REASONING_KEYS
from dstune.data.messages import NO_ARGUMENTS, first_unusual
from dstune.data.problems import unprinted

__all__ = ["ChatRenderer", "RenderError"]


_UNDEFINED = re.compile(r"'(\w+)' is undefined")


@dataclass(frozen=True)
class Choice:
    """Which parts of a conversation are trained."""

    turns: str = "auto"
    """`auto`: the turns that the template marks, or every turn if it has no marks; `all`: every turn; `last`: only the last."""
    drop_reasoning: bool = False
    inlines_reasoning: bool = False
    """Reasoning is written at the beginning of the content if the template has no field for it."""
    reasoning_marks: tuple[str, ...] = ()
    """The opening and closing mark around inlined reasoning; empty: those of the template or the vocabulary."""
    whole: bool = False
    """The complete conversation is one passage, for a model that scores it; the part from the first trained answer on counts."""


class ChatRenderer:
    """Renders conversations for one tokenizer and finds the assistant's text in them; picklable.

    Raises UserError if the tokenizer has no chat template, no offsets, or a template whose assistant turns have no end.
    """

    def __init__(
        self,
        tokenizer: Any,
        template_date: str | None,
        arguments: Mapping[str, Any] | None = None,
        choice: Choice | None = None,
    ):
        if not tokenizer.chat_template:
            raise UserError(
                Problem(
                    where="model.chat_template",
                    reason="the model has no chat template, so task=chat cannot tell who speaks",
                    fix="set model.chat_template to a Jinja file, or choose a model tuned for chat",
                )
            )
        require_offsets(tokenizer)
        if strange := sorted(NO_ARGUMENTS.intersection(arguments or {})):
            reason = "is no argument of a template, but of transformers' rendering"
            raise UserError(Problem(f"task.chat_template_kwargs.{strange[0]}", reason, "leave it out"))
        self._tokenizer = tokenizer
        self.choice = choice or Choice()
        self._control = ControlTokens(tokenizer)
        self._template = ChatTemplate(tokenizer, template_date, arguments)
        # White space can be an added token (Gemma), but it ends no turn.
        self._special = alternatives(token.content for token in tokenizer.added_tokens_decoder.values())
        self._fixes = TemplateFixes(self._template)
        with self._template.opening():
            self.facts: Facts = facts_of(self._template)
            self.inline_reasoning = InlineReasoning(
                self._template, self.facts, self.choice.reasoning_marks, is_used=self.choice.inlines_reasoning
            )
            if not self.choice.whole:
                _ = self.stops  # so that a template without ends is refused at once

    @property
    def date(self) -> str | None:
        """The date that the template uses as today."""
        return self._template.date

    @property
    def run_arguments(self) -> Mapping[str, Any]:
        """The template arguments set for the run."""
        return self._template.arguments

    def has_marks(self, tools: Tools | None) -> bool:
        """Return whether the template itself marks the trained text (`{% generation %}`)."""
        return self._template.has_marks(tools)

    def _obeys_marks(self, tools: Tools | None) -> bool:
        return self.choice.turns == "auto" and self._template.has_marks(tools)

    def holds_control_tokens(self, row: Mapping[str, Any]) -> bool:
        """Return whether any text of the row contains what reads like a control token."""
        return bool(self._control.first(dict(row)))

    @cached_property
    def stops(self) -> Stops:
        """The texts that end a turn. Raises UserError if the template prints none."""
        try:
            return learn_stops(self._template, self.facts, known_stops(self._tokenizer))
        except (RuleError, RenderError) as error:
            reason, fix = str(error), "set model.chat_template to a template for conversations of user and assistant"
            if "learn to stop" in reason:
                fix = "print the end-of-turn token after each assistant message, for example {{ eos_token }}"
            elif argument := _UNDEFINED.search(reason):
                fix = f"task.chat_template_kwargs='{{{argument.group(1)}: ...}}', or {fix}"
            raise UserError(Problem("model.chat_template", reason, fix)) from None

    def prompt_ids(
        self,
        messages: Messages,
        *,
        tools: Tools | None = None,
        arguments: Mapping[str, Any] | None = None,
        answer: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Return the token ids of the conversation so far and of the generation prompt, after which the assistant speaks.

        arguments: the row's template arguments. answer: the message that the row has at this place; it decides whether the
        model should think. Without an answer, the defaults of the template decide.
        """
        template_arguments = dict(arguments or {})
        if answer is not None:
            template_arguments = self.arguments_for(self.prepare_messages([dict(answer)])[0], template_arguments)
        messages = self.prepare_messages(messages, tools)
        return prompt_ids(
            self._template, self._control, self.facts, messages, tools=tools, arguments=template_arguments
        )

    def arguments_for(self, message: Mapping[str, Any], row: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Return the template's arguments for a turn: those of the run and of its row. If neither sets the thinking switch, the
        switch is on exactly when `message` has reasoning."""
        switch = self.facts.switch
        thinks = {} if switch is None else {switch: has_reasoning(message)}
        return thinks | self._template.arguments | dict(row or {})

    def passages(
        self, messages: Messages, *, tools: Tools | None = None, arguments: Mapping[str, Any] | None = None
    ) -> list[Passage]:
        """Return the texts to train on, with the places that the assistant writes.

        Raises RenderError if the template refuses the conversation or drops a part of it, or if the targets cannot be located.
        """
        messages = self.prepare_messages(messages, tools)
        trained = self.trained(messages)
        self._refuse_dropped(messages, tools, trained, arguments)
        adapted = [self.facts.adapted(message) for message in messages]
        try:
            return self._passages(messages, adapted, trained, tools, arguments)
        except TemplateRefusal as error:
            end = trained[-1] + 1 if trained else len(messages)
            fixes = self._fixes.of_refusal(adapted[:end], tools, self.arguments_for(messages[end - 1], arguments))
            raise RenderError("".join([str(error), *(f"; {fix}" for fix in fixes)])) from None

    def _passages(
        self,
        messages: Messages,
        adapted: Messages,
        trained: list[int],
        tools: Tools | None,
        arguments: Mapping[str, Any] | None,
    ) -> list[Passage]:
        template_arguments = self.arguments_for(messages[trained[-1]] if trained else {}, arguments)
        if (number := first_unusual(messages)) is not None:
            refuse_unprinted_messages(self._template, adapted, tools, template_arguments, number)
        refuse_unprinted_parts(self._template, self.facts, messages, tools, template_arguments)
        if self.choice.whole:
            return [self._scored(adapted, tools, arguments, trained)]
        if not trained:
            return []
        of_last = self.arguments_for(messages[trained[-1]], arguments)
        agrees = self._template.agrees(adapted, tools=tools, arguments=of_last)
        render = self._template.direct if agrees else self._template.text
        turns = [
            turn
            for number in trained
            if (turn := self._turn(adapted, tools, arguments, number, render, messages[number]))
        ]
        if not turns:
            return []
        whole = turns[-1].answered
        if turns[-1].number < len(messages) - 1:
            whole = render(adapted, tools=tools, arguments=of_last)
        row_passages = passages(whole, turns, self._special)
        if not self._obeys_marks(tools):
            return row_passages
        for at, passage in enumerate(row_passages):
            last = passage.places[-1].number
            template_arguments = {"tools": tools, "arguments": self.arguments_for(messages[last], arguments)}
            moved = next((turn for turn in turns if turn.answered is passage.text and turn.moved is not None), None)
            if moved is not None:
                marks = self._moved_marks(adapted[: moved.number + 1], moved, **template_arguments)
            else:
                passage_messages = adapted if passage.text is whole else adapted[: last + 1]
                marks = self._template.marks(passage_messages, **template_arguments)
            row_passages[at] = only_marked(passage, marks)
        return [passage for passage in row_passages if passage.places]

    def _moved_marks(self, messages: Messages, turn: Turn, **options: Any) -> list[Span]:
        """Return the marks of a moved turn, whose text is the prompt P followed by what the full rendering F adds: the marks of P,
        then those of F from the start of the turn."""
        assert turn.moved is not None
        prompt_marks = self._template.marks(messages[:-1], prompt=True, **options)
        text_marks = (
            (start + turn.moved, end + turn.moved) for start, end in self._template.marks(messages, **options)
        )
        return [*prompt_marks, *((max(start, turn.start), end) for start, end in text_marks if end > turn.start)]

    def whole_and_untrained(
        self, messages: Messages, *, tools: Tools | None = None, arguments: Mapping[str, Any] | None = None
    ) -> list[tuple[Passage, list[Span]]]:
        """Return the passages, one of which holds the complete conversation, each with the character spans of its untrained turns:
        those of weight 0, and those whose reasoning the template hides.

        Raises RenderError as `passages` does, and if such a turn cannot be located in a passage.
        """
        all_passages = self.passages(messages, tools=tools, arguments=arguments)
        messages = self.prepare_messages(messages, tools)
        adapted = [self.facts.adapted(message) for message in messages]
        last = next((message for message in reversed(messages) if message["role"] == "assistant"), {})
        whole = self._template.text(adapted, tools=tools, arguments=self.arguments_for(last, arguments))
        if not any(passage.text.startswith(whole) for passage in all_passages):
            all_passages.append(Passage(whole, ()))
        trained = self.trained(messages)
        untrained = [
            number
            for number, message in enumerate(messages)
            if not message.get("weight", 1) or (self._hides(message) and number not in trained)
        ]
        turns = [
            turn for number in untrained if (turn := self._turn(adapted, tools, arguments, number, self._template.text))
        ]
        result = []
        for passage in all_passages:
            places = [place_in(passage.text, turn, self._special) for turn in turns if len(passage.text) > turn.start]
            if not all(places):
                raise RenderError(
                    "the chat template rewrites turns of weight 0, so task.train_on_prompt cannot leave them out"
                )
            result.append((passage, sorted((place.start, place.end) for place in places if place is not None)))
        return result

    def note_of_code(self, row: Mapping[str, Any]) -> str | None:
        """Return a note if servers that render this row's conversation in code may produce a different text."""
        return None if self._is_packaged_mistral else note_of(self._template.source(row.get("tools")), row["messages"])

    @property
    def _is_packaged_mistral(self) -> bool:
        """Whether the template is a packaged one that was compared with mistral-common and renders the same text."""
        source = self._template.source(None)
        return any(source == template_path(name).read_text(encoding="utf-8") for name in ("mistral", "mistral_tekken"))

    def trained(self, messages: Messages) -> list[int]:
        """Return the indices of the assistant messages that are trained; `messages` come from `prepare_messages`.

        If the template prints the reasoning of some turns and hides that of others, the turns with hidden reasoning serve only as
        context: trained without it, they would teach the model not to think. If it prints no reasoning of this row, all turns
        stay, and `passages` refuses the row for its hidden reasoning.
        """
        numbers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        if self.choice.turns == "last":
            numbers = numbers[-1:]
        numbers = [number for number in numbers if messages[number].get("weight", 1)]
        visible = [number for number in numbers if not self._hides(messages[number])]
        return visible if any(number and has_reasoning(messages[number]) for number in visible) else numbers

    def count_hidden(self, messages: Messages) -> int:
        """Return how many turns of a row serve only as context because the template hides their reasoning."""
        messages = self.prepare_messages(messages)
        trained = self.trained(messages)
        return sum(self._hides(message) and number not in trained for number, message in enumerate(messages))

    def _hides(self, message: Mapping[str, Any]) -> bool:
        """Return whether the message has reasoning in a separate field and the template does not print it."""
        return reasoning_of(message) is not None and bool(message.get("tool_calls")) not in self.facts.reasons_in

    def _turn(
        self,
        adapted: Messages,
        tools: Tools | None,
        row: Mapping[str, Any] | None,
        number: int,
        render: Render,
        expected: Mapping[str, Any] | None = None,
    ) -> Turn | None:
        """Return the turn; None if no message precedes it, or only messages without a user's that the template refuses to render.

        expected: the message that the turn must print, as returned by `prepare_messages`. Raises RenderError if it does not.
        """
        message = adapted[number]
        arguments = self.arguments_for(message, row)
        if not number:
            return None
        try:
            prompt = render(adapted[:number], tools=tools, arguments=arguments, prompt=True)
        except RenderError:
            if any(earlier["role"] == "user" for earlier in adapted[:number]):
                raise
            return None
        turn_messages = adapted[: number + 1]
        answered = render(turn_messages, tools=tools, arguments=arguments)
        calls = bool(message.get("tool_calls"))
        moved = None
        if not answered.startswith(prompt):
            target = text_behind_prompt(turn_messages, prompt, answered, arguments, tools, render)
            if target is not None:
                moved = len(prompt) - (len(answered) - len(target))
                answered = prompt + target
        try:
            turn = replace(turn_of(number, prompt, answered, self.stops, calls=calls), moved=moved)
        except RuleError as error:
            fix_text = "".join(
                f"; {fix}" for fix in self._fixes.of_turn(turn_messages, tools, arguments, prompt, self.stops)
            )
            raise RenderError(f"message {number + 1} (assistant): {error}{fix_text}") from None
        if expected is not None and (unprinted_field := unprinted_part(turn, expected)):
            fixes = ["task.reasoning=drop trains without it"] if unprinted_field == "reasoning" else []
            fix_text = "".join(
                f"; {fix}" for fix in [*fixes, *self._fixes.by_packaged(turn_messages, tools, arguments)]
            )
            raise RenderError(
                f"message {number + 1} (assistant): the chat template does not print its {unprinted_field}, "
                f"so it would not be trained{fix_text}"
            )
        return turn

    def _scored(
        self, adapted: Messages, tools: Tools | None, row: Mapping[str, Any] | None, trained: list[int]
    ) -> Passage:
        """Return the complete conversation as one passage; the counted part starts at the first scored answer."""
        arguments = self.arguments_for(adapted[trained[-1]] if trained else {}, row)
        text = self._template.text(adapted, tools=tools, arguments=arguments)
        if not trained:
            return Passage(text, ())
        prompt = self._template.text(adapted[: trained[0]], tools=tools, arguments=arguments, prompt=True)
        start = in_common(prompt, text)
        return Passage(text, (Place(trained[0], start, len(text), len(text), ((start, len(text)),)),))

    def prepare_messages(self, messages: Messages, tools: Tools | None = None) -> Messages:
        """Return `messages` in the form that the template reads. `task.reasoning` decides whether their reasoning stays in its
        field, is dropped, or moves into the content."""
        messages = with_call_ids(as_template_reads(messages, self._template.source(tools)), self.facts.call_ids)
        if self.choice.drop_reasoning:
            return [without_reasoning(message) for message in messages]
        if self.choice.inlines_reasoning:
            return [self.inline_reasoning.adapted(message) for message in messages]
        return messages

    def _refuse_dropped(
        self, messages: Messages, tools: Tools | None, trained: Sequence[int], arguments: Mapping[str, Any] | None
    ) -> None:
        """Check the row for content that the template never prints. Raises RenderError if there is any."""
        fields = dropped_fields(self.facts, messages, tools)
        fix = "set model.chat_template to one that does"
        end = trained[-1] + 1 if trained else len(messages)
        template_arguments = self.arguments_for(messages[end - 1], arguments)
        drops_something = fields or any(map(self._hides, messages))
        if drops_something and self._fixes.by_packaged(messages[:end], tools, template_arguments):
            fix += f" (the packaged {self._fixes.packaged} does)"
        hidden = [bool(messages[number].get("tool_calls")) for number in trained if self._hides(messages[number])]
        if hidden:
            fixes = ["task.reasoning=drop trains without it", fix]
            if not self.choice.inlines_reasoning and self.inline_reasoning.printed_in.intersection(hidden):
                fixes.insert(0, self.inline_reasoning.fix)
            fix = fix if fields else f"{', '.join(fixes[:-1])}, or {fixes[-1]}"
            which = ""
            if reasons_in := self.facts.reasons_in:
                which = " of turns that call no tool" if True in reasons_in else " of turns that call tools"
            fields.append(f"reasoning ({', '.join(REASONING_KEYS)}){which}")
        if fields:
            raise RenderError(unprinted(" and ".join(filter(None, [", ".join(fields[:-1]), fields[-1]])), fix))

    def rewrite_template(self) -> None:
        """Change the tokenizer's chat template so that it prints a reasoning field the way `task.reasoning=inline` trained it."""
        if self.choice.inlines_reasoning:
            self.inline_reasoning.rewrite_template(self._tokenizer)


def known_stops(tokenizer: Any) -> frozenset[str]:
    """Return the tokens that end an answer regardless of the template: those of the generation settings and the tokenizer."""
    ids = {*marked_stops(tokenizer), *([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])}
    added = tokenizer.added_tokens_decoder
    return frozenset(added[number].content for number in ids if number in added)
