"""Prove that a run trains what a server would make the model write: compare samples with transformers' own rendering.

This module shares no code with the making of samples, apart from the list of tokens that end a turn.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2

from dstune.core.confinement.here import TooMuch, limited
from dstune.core.confinement.table import TEMPLATE_PROOF
from dstune.core.errors import Problem, UserError
from dstune.data.chat.content_format import as_template_reads
from dstune.data.chat.probe import Facts
from dstune.data.collate import NO_TARGET
from dstune.data.images.processor import ImageProcessor
from dstune.data.message import content_start
from dstune.data.template_date import freeze_date

_FOLLOWS = "qzfollows"
"""The text of a made-up message."""

_EMPTY_THOUGHT = re.compile(r"[<\[\u25c1].*(?:think|thought|reason).*[>\]\u25b7]", re.S | re.I)
"""What a prompt may contain beyond the conversation, apart from white space."""

REFUSALS = (jinja2.TemplateError, TypeError, ValueError, KeyError, IndexError, AttributeError)
"""Errors that a template may raise to refuse a conversation."""


@dataclass(frozen=True)
class Served:
    """A turn as a server sees it, in tokens."""

    number: int
    """Index of the message."""
    prompt: list[int]
    """The tokens that the model reads."""
    target: list[int]
    """The tokens that the model should write, without the one that ends the turn."""
    stop: int | None
    """The token that ends the turn: the template's, otherwise the one that opens the next message."""
    by_text: bool = False
    """Whether the turn ends with text, which is then part of the target."""

    @property
    def length(self) -> int:
        """Number of tokens in the prompt, the target and the stop."""
        return len(self.prompt) + len(self.target) + (not self.by_text)


@dataclass(frozen=True)
class Server:
    """Renders conversations as a server does: with a plain transformers tokenizer and a run's arguments."""

    tokenizer: Any
    stops: frozenset[int]
    """Ids of the tokens at which the server stops."""
    date: str | None
    """The day that the template uses as today."""
    arguments: Mapping[str, Any]
    facts: Facts
    ending: tuple[str, str] | None = None
    """For a template that ends turns with text instead of a token: that text, and all that the template prints after an answer."""
    images: Sequence[Any] = ()
    """The PIL images of the row."""
    processor: ImageProcessor | None = None
    """The model's image processor, if the row has images."""

    def turns(self, row: Mapping[str, Any], numbers: Iterable[int] | None = None) -> list[Served]:
        """Return the assistant's turns of `row` (`messages`, `tools`, `chat_template_kwargs`), without those of weight 0.

        numbers: indices of the messages to consider; None: all.
        """
        messages = row["messages"]
        message_numbers = range(1, len(messages)) if numbers is None else numbers
        return [
            turn
            for number in message_numbers
            if messages[number]["role"] == "assistant" and messages[number].get("weight", 1)
            if (turn := self._turn(row, number)) is not None
        ]

    def whole(self, row: Mapping[str, Any]) -> list[int]:
        """Return the tokens of the complete conversation."""
        messages = self._messages(row)
        last: dict[str, Any] = next((message for message in reversed(messages) if message["role"] == "assistant"), {})
        variables = {**self._thinks(last), **self.arguments, **(row.get("chat_template_kwargs") or {})}
        return self._ids(self._rendered(messages, row.get("tools"), variables, prompt=False))

    def _messages(self, row: Mapping[str, Any]) -> list[dict[str, Any]]:
        unweighted = ({key: value for key, value in message.items() if key != "weight"} for message in row["messages"])
        return [self.facts.adapted(message) for message in unweighted]

    def marks(self, row: Mapping[str, Any], ids: list[int], max_length: int) -> list[bool] | None:
        """Return whether the template marks each token of a sample (`{% generation %}`); None if the sample is neither the
        conversation nor a beginning of it."""
        messages = self._messages(row)
        answers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        for end in dict.fromkeys([len(messages), *(number + 1 for number in answers)]):
            last = max((number for number in answers if number < end), default=0)
            variables = {
                **self._thinks(messages[last]),
                **self.arguments,
                **(row.get("chat_template_kwargs") or {}),
            }
            try:
                encoded = self.tokenizer.apply_chat_template(
                    messages[:end],
                    tools=row.get("tools") or None,
                    chat_template=freeze_date(
                        self.tokenizer.get_chat_template(tools=row.get("tools") or None), self.date
                    ),
                    return_dict=True,
                    return_assistant_tokens_mask=True,
                    **variables,
                )
            except REFUSALS:
                continue
            tokens, marked = encoded["input_ids"], [bool(mark) for mark in encoded["assistant_masks"]]
            supplied = len(ids) - len(tokens)  # a stop that the template does not print
            if tokens[: len(ids)] == ids[: len(tokens)] and (supplied in (0, 1) or len(ids) == max_length):
                return [*marked, *[False] * supplied][: len(ids)]
        return None

    def counted(self, turn: Served, marks: list[bool]) -> list[bool]:
        """Return whether each token of the target and the stop after it counts. If marks leave out only tags and white space at the
        end, the stop counts as well."""
        start, length = len(turn.prompt), len(turn.target) + 1
        inside = [*marks[start : start + length], *[False] * length][:length]
        if True not in inside:
            return inside
        last = length - 1 - inside[::-1].index(True)
        text_behind = re.sub(r"<[^<>]*>|\s", "", self._read(turn.target[last + 1 :]))
        return inside if text_behind else [*inside[: last + 1], *[True] * (length - last - 1)]

    def _turn(self, row: Mapping[str, Any], number: int) -> Served | None:
        messages = [
            self.facts.adapted({key: value for key, value in message.items() if key != "weight"})
            for message in row["messages"][: number + 1]
        ]
        thinks = self._thinks(messages[number])
        variables = {**thinks, **self.arguments, **(row.get("chat_template_kwargs") or {})}
        try:
            prompt_text = self._rendered(messages[:number], row.get("tools"), variables, prompt=True)
        except REFUSALS:
            if any(message["role"] == "user" for message in messages[:number]):
                raise
            return None  # nothing was asked yet
        answered = self._rendered(messages, row.get("tools"), variables, prompt=False)
        if not answered.startswith(prompt_text):
            added = self._added(messages, row.get("tools"), variables, prompt_text, answered)
            answered = answered if added is None else prompt_text + added
        by_text = self.ending is not None and answered.endswith(self.ending[1])
        if self.ending is not None and by_text:
            answered = answered.removesuffix(self.ending[1]) + self.ending[0]
        prompt, whole = self._ids(prompt_text), self._ids(answered)
        written = whole[len(prompt) :]
        if whole[: len(prompt)] != prompt:
            written = self._continuation(prompt, answered.removeprefix(prompt_text), whole)
        end = next((at for at, token in enumerate(written) if token in self.stops), None)
        by_text = by_text and end is None
        stop = (
            None if by_text else self._opening(messages, row.get("tools"), variables) if end is None else written[end]
        )
        return Served(number, prompt, written[:end], stop, by_text)

    def _added(
        self, messages: list[dict], tools: Any, arguments: Mapping[str, Any], requested: str, answered: str
    ) -> str | None:
        """Return the text of the last message if its prompt is no prefix of the conversation; None if that is ambiguous.

        Prompt and conversation are compared after the message before it. Either the conversation repeats the generation prompt
        after different white space, or it leaves out the end of the prompt: white space, or a closed thought.
        requested: the prompt.
        """
        *earlier, last, turn = messages
        content = last.get("content") or ""
        follows = [*content, {"type": "text", "text": _FOLLOWS}] if isinstance(content, list) else content + _FOLLOWS
        begun = [*earlier, {**last, "content": follows}]
        prompt_end, conversation, message_end = (
            text[text.rfind(_FOLLOWS) + len(_FOLLOWS) :]
            for text in (
                self._rendered(begun, tools, arguments, prompt=True),
                self._rendered([*begun, turn], tools, arguments, prompt=False),
                self._rendered(begun, tools, arguments, prompt=False),
            )
        )
        if not (requested.endswith(prompt_end) and answered.endswith(conversation)):
            return None
        heading = prompt_end[len(message_end) :] if prompt_end.startswith(message_end) else ""
        at = conversation.find(heading)
        if heading.strip() and at >= 0 and "".join(conversation[:at].split()) == "".join(message_end.split()):
            return conversation[at + len(heading) :]
        for at in range(len(prompt_end), -1, -1):
            omitted = prompt_end[at:].strip()
            if conversation.startswith(prompt_end[:at]) and (not omitted or _EMPTY_THOUGHT.fullmatch(omitted)):
                return conversation[at:]
        return None

    def _opening(self, messages: list[dict], tools: Any, arguments: Mapping[str, Any]) -> int | None:
        """Return the stop token that opens the next message, which ends a turn that the template itself does not end; None if the
        template prints none. After calls, the next message is a tool's result, otherwise the user's."""
        follows: dict[str, Any] = {"role": "user", "content": _FOLLOWS}
        if calls := messages[-1].get("tool_calls"):
            follows = {"role": "tool", "content": _FOLLOWS, "name": calls[0]["function"]["name"]}
            follows |= {"tool_call_id": calls[0]["id"]} if "id" in calls[0] else {}
        try:
            text = self._rendered([*messages, follows], tools, arguments, prompt=False)
        except REFUSALS:
            return None
        ids_before = self._ids(text[: text.rfind(_FOLLOWS)]) if _FOLLOWS in text else []
        return next((token for token in reversed(ids_before) if token in self.stops), None)

    def _continuation(self, prompt: list[int], text: str, whole: list[int]) -> list[int]:
        """Return the tokens of `text` after a prompt that ends inside a token of `whole`, so that both decode to the same text.

        Some tokenizers put a space in front of any text that follows an added token; an answer that continues a prompt has none.
        """
        begun = self.tokenizer.eos_token, self.tokenizer.eos_token + "\n"
        behind_token, inside_text = (self._ids(begin + text)[len(self._ids(begin)) :] for begin in begun)
        expected = self._read(whole)
        if self._read([*prompt, *behind_token]) == expected:
            return behind_token
        # A tokenizer that merges two spaces into one decodes the whole with fewer than its pieces.
        is_same_text = re.sub(" +", " ", self._read([*prompt, *inside_text])) == re.sub(" +", " ", expected)
        return inside_text if is_same_text else behind_token

    def _read(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def _thinks(self, message: Mapping[str, Any]) -> dict[str, Any]:
        if self.facts.switch is None:
            return {}
        fields = [message.get(key) for key in ("reasoning_content", "reasoning", "thinking")]
        text_before, end_tag, _ = content_start(message.get("content")).partition("</think>")
        opened = text_before.lstrip().removeprefix("<think>")
        inline = opened if end_tag and "<think>" not in opened else ""
        return {self.facts.switch: any(str(text or "").strip() for text in (*fields, inline))}

    def _rendered(self, messages: list[dict], tools: Any, arguments: Mapping[str, Any], *, prompt: bool) -> str:
        source = freeze_date(self.tokenizer.get_chat_template(tools=tools or None), self.date)
        try:
            with limited(TEMPLATE_PROOF):
                text = self.tokenizer.apply_chat_template(
                    as_template_reads(messages, source),
                    tools=tools or None,
                    chat_template=source,
                    add_generation_prompt=prompt,
                    tokenize=False,
                    **arguments,
                )
        except TooMuch as error:
            reason = f"to print a conversation of {len(messages)} messages the chat template {error}"
            raise UserError(Problem("model.chat_template", reason, "another template")) from None
        return str(text)

    def _ids(self, text: str) -> list[int]:
        if self.processor is not None:
            count = text.count(self.processor.placeholder)
            return self.processor.tokens(text, self.images[:count], self.tokenizer)
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids


def difference(
    turn: Served,
    samples: Sequence[Mapping[str, Any]],
    stops: frozenset[int],
    *,
    max_length: int = sys.maxsize,
    all_trained: bool = False,
    counted: Sequence[Sequence[bool] | None] | None = None,
) -> str | None:
    """Return why no sample trains `turn` as it is served; None if one does.

    samples: the row's samples, each with `input_ids` and `labels`; one that is cut at `max_length` has to hold the turn as far
    as it reaches. all_trained: whether the context counts too (`task.train_on_prompt`). counted: for a template with marks,
    which tokens of target and stop count in each sample; None where that is unknown.
    """
    differences: list[str] = []
    others: list[str] = []
    for number, sample in enumerate(samples):
        which = [True] * (len(turn.target) + 1) if counted is None else counted[number]
        ids, labels = [int(token) for token in sample["input_ids"]], [int(label) for label in sample["labels"]]
        start, end = len(turn.prompt), len(turn.prompt) + len(turn.target)
        context = turn.prompt[: len(ids)]
        if ids[: len(context)] != context:
            at = next(at for at, (a, b) in enumerate(zip(ids, context, strict=False)) if a != b)
            others.append(f"token {at} of the context is {ids[at]}, a server reads {context[at]}")
            continue
        if len(ids) < min(turn.length, max_length):
            others.append(f"a sample of {len(ids)} tokens ends where a server goes on to token {turn.length}")
            continue
        written = turn.target[: max(0, len(labels) - start)]
        if reads := [at for at, token in enumerate(written) if ids[start + at] != token]:
            at = reads[0]
            differences.append(
                f"token {start + at} is {ids[start + at]}, a server would have the model write {written[at]}"
            )
            continue
        trained = labels[start : start + len(written)]
        expected = [token if which is None or which[at] else NO_TARGET for at, token in enumerate(written)]
        ignored = {NO_TARGET} if which is None else set()
        differ = [at for at, (a, b) in enumerate(zip(trained, expected, strict=True)) if a != b and a not in ignored]
        if differ:
            at = differ[0]
            label_text = "not trained" if trained[at] == NO_TARGET else f"trained as {trained[at]}"
            why = (
                f"a server would have the model write {written[at]}" if expected[at] != NO_TARGET else "it has no mark"
            )
            differences.append(f"token {start + at} is {label_text}, {why}")
            continue
        if end < len(labels):
            stop = labels[end]
            if stop == NO_TARGET and (turn.by_text or which is None or not which[-1]):
                return None
            if (turn.by_text or (which is not None and not which[-1])) and not all_trained:
                differences.append(f"token {end} is trained, behind the end of the turn")
                continue
            if not turn.by_text and (stop not in stops or (turn.stop is not None and stop != turn.stop)):
                differences.append(f"token {end} is {stop}, where the turn ends")
                continue
            if end + 1 < len(labels) and labels[end + 1] != NO_TARGET and not all_trained:
                differences.append(f"token {end + 1} is trained, behind the end of the turn")
                continue
        if start and start <= len(labels) and labels[start - 1] != NO_TARGET and not all_trained:
            differences.append(f"token {start - 1} of the context is trained")
            continue
        return None
    return [*others, *differences][-1] if samples else "no sample holds it"
