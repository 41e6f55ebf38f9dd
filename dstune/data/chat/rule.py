"""Find the text of a conversation that is trained: what a server would make the model write. Pure functions of rendered texts.

For the assistant's turn k, P is `messages[:k]` with the generation prompt and F is `messages[:k + 1]`, both as
transformers' `apply_chat_template` renders them. The target is what F adds to P, up to the first stop. Example (ChatML):

    P       <|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n
    F       <|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYes<|im_end|>\n
    target  Yes<|im_end|>

A passage holds all turns whose P it begins with, if their target follows there. A template that rewrites the history (Qwen 3
drops the reasoning of earlier turns) gives several passages, with each target in exactly one of them. If the history differs
only in the stop (gpt-oss writes `<|return|>`, and later turns see `<|end|>`), the label of that one token differs from the
input.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from dstune.data.chat.thoughts import ends_thought, is_closed, opens

Span = tuple[int, int]
"""Characters [start, end) of a rendered text."""

EXCERPT_CHARACTERS = 60
LONGEST_BEYOND = 1000
"""Limit of the end of a prompt that the conversation may leave out, in characters."""

_TAGS = re.compile(r"<[^<>]*>|\s")


class RuleError(ValueError):
    """The target of a turn cannot be determined; the text says why."""


@dataclass(frozen=True)
class Stops:
    """What ends a turn."""

    tokens: frozenset[str]
    """Tokens at which a server stops: those of the generation settings, of the tokenizer, and those that the template prints."""
    plain: str = ""
    """The text after every turn, if the template ends turns without a token."""
    trailing: str = ""
    """What F prints after the answer in that case; it starts with `plain`."""
    supplied: Mapping[bool, str] = field(default_factory=dict)
    """By whether a turn calls tools: the token that opens the next message, if F prints no end."""

    @property
    def pattern(self) -> re.Pattern[str]:
        return alternatives(self.tokens)


@dataclass(frozen=True)
class Turn:
    """One turn to train."""

    number: int
    """Index of the message."""
    prompt: str
    """P."""
    answered: str
    """F, followed by the stop if the template prints none."""
    body: str
    """What the model writes before it stops."""
    stop: str
    moved: int | None = None
    """If P does not begin F, `answered` is P with what F adds; this is the number of characters by which that text is later than in
    F."""

    @property
    def start(self) -> int:
        """Where the target starts, in F and in every passage that holds it."""
        return len(self.prompt)

    @property
    def body_end(self) -> int:
        return len(self.prompt) + len(self.body)


@dataclass(frozen=True)
class Place:
    """Where a passage holds the target of a turn, in characters."""

    number: int
    """Index of the message."""
    start: int
    body_end: int
    """Where the stop is."""
    end: int
    spans: tuple[Span, ...]
    """The characters that count in the loss, within [start, end): all of them unless the template marks fewer."""
    label: tuple[int, str] | None = None
    """If the text continues with a token other than the stop: the first character of that token, and the stop."""


@dataclass(frozen=True)
class Passage:
    """A text to train on, with the places of the turns that it holds, in order."""

    text: str
    places: tuple[Place, ...]


def alternatives(tokens: Iterable[str]) -> re.Pattern[str]:
    """Return a pattern that matches any of `tokens`, the longest first; without tokens, one that never matches."""
    ordered = sorted((token for token in tokens if token.strip()), key=lambda token: (-len(token), token))
    return re.compile("|".join(map(re.escape, ordered)) or r"(?!)")


def turn_of(number: int, prompt: str, answered: str, stops: Stops, *, calls: bool = False) -> Turn:
    """Return the turn whose P is `prompt` and whose F is `answered`. Raises RuleError."""
    if not answered.startswith(prompt):
        raise RuleError(_prompt_mismatch(prompt, answered))
    start = len(prompt)
    if stop_match := stops.pattern.search(answered, start):
        return Turn(number, prompt, answered, answered[start : stop_match.start()], stop_match.group())
    if stops.plain and answered.endswith(stops.trailing):
        return Turn(number, prompt, answered, answered[start : len(answered) - len(stops.trailing)], stops.plain)
    if stop := stops.supplied.get(calls):
        return Turn(number, prompt, answered + stop, answered[start:], stop)
    turn_kind = "a turn that calls tools" if calls else "this turn"
    raise RuleError(
        f"the chat template prints no end of {turn_kind} ({_tail(answered)}), so the model would not learn to stop"
    )


def behind_message(prompt: str, answered: str, closed: str, *, thinks: bool) -> str | None:
    """Return what F adds to P, judged by what both print after the message before the turn; None if it is ambiguous.

    prompt, answered: what P and F print there. closed: what P without the generation prompt prints there. thinks: whether the
    turn has reasoning.

    There are two cases. F repeats the generation prompt after other white space than P (Hermes ends a tool's result with a line
    break as soon as a message follows). Or P goes beyond the beginning that both share by white space only or, for a turn
    without reasoning, by a closed thought. After anything else the model would have to write text that the conversation lacks.
    """
    heading = prompt.removeprefix(closed)
    if heading.strip() and prompt.startswith(closed):
        text_before, printed_heading, target = answered.partition(heading)
        if printed_heading and _without_space(text_before) == _without_space(closed):
            return target
    for at in range(in_common(prompt, answered), -1, -1):
        beyond = prompt[at:]
        target = answered[at:]
        if not beyond.strip():
            return target
        if not thinks and not opens(target) and (is_closed(beyond) or ends_thought(prompt[:at], beyond)):
            return target
        if len(prompt) - at > LONGEST_BEYOND:
            break
    return None


def passages(whole: str, turns: Sequence[Turn], special: re.Pattern[str]) -> list[Passage]:
    """Return the texts that hold the targets of `turns`, in the order of their first turns.

    whole: the complete conversation; it is preferred, since all turns share it unless the template rewrites the history.
    special: matches the tokens that may take the place of a stop. Example, Qwen 3 with reasoning in both turns:

        whole   u1 a1 u2 <think>r2</think> a2        holds only turn 2: F of turn 1 continues with <think>r1
        F1      u1 <think>r1</think> a1              holds turn 1
    """
    unplaced = list(turns)
    passages_in_order: list[Passage] = []
    if unplaced and whole and unplaced[-1].answered.startswith(whole):
        whole = unplaced[-1].answered  # with the stop that was supplied
    texts = [whole, *(turn.answered for turn in reversed(turns))]
    for text in texts:
        if not unplaced:
            break
        if text is not whole and all(turn.answered is not text for turn in unplaced):
            continue
        places = {turn.number: place for turn in unplaced if (place := place_in(text, turn, special))}
        if places:
            passages_in_order.append(Passage(text, tuple(places.values())))
            unplaced = [turn for turn in unplaced if turn.number not in places]
    assert not unplaced, "every turn is in the text that was rendered for it"
    return sorted(passages_in_order, key=lambda passage: passage.places[0].number)


def place_in(text: str, turn: Turn, special: re.Pattern[str]) -> Place | None:
    """Return where `text` holds the target directly after P; None if it does not."""
    if not text.startswith(turn.prompt) or not text.startswith(turn.body, turn.start):
        return None
    at = turn.body_end
    if text.startswith(turn.stop, at):
        end = at + len(turn.stop)
        return Place(turn.number, turn.start, at, end, ((turn.start, end),))
    if other := special.match(text, at):  # a different token in the place of the stop
        return Place(turn.number, turn.start, at, other.end(), ((turn.start, other.end()),), (at, turn.stop))
    return None


def only_marked(passage: Passage, marks: Sequence[Span]) -> Passage:
    """Return `passage` restricted to what its template marks (`{% generation %}`); turns without any mark are left out."""
    places = (replace(place, spans=_marked(passage.text, place, marks)) for place in passage.places)
    return Passage(passage.text, tuple(place for place in places if place.spans))


def _marked(text: str, place: Place, marks: Sequence[Span]) -> tuple[Span, ...]:
    spans = []
    for first, last in marks:
        # Some templates leave the end of the turn out of their marks.
        if place.start < last <= place.end and not _TAGS.sub("", text[last : place.body_end]):
            last = place.end
        first, last = max(first, place.start), min(last, place.end)
        if first < last:
            spans.append((first, last))
    return tuple(_joined(spans))


def _joined(spans: Sequence[Span]) -> list[Span]:
    joined: list[Span] = []
    for start, end in sorted(spans):
        if joined and start <= joined[-1][1]:
            start, end = joined[-1][0], max(end, joined.pop()[1])
        joined.append((start, end))
    return joined


def in_common(first: str, second: str) -> int:
    """Return the length of the common prefix."""
    different = (at for at, (a, b) in enumerate(zip(first, second, strict=False)) if a != b)
    return next(different, min(len(first), len(second)))


def _without_space(text: str) -> str:
    return "".join(text.split())


def _prompt_mismatch(prompt: str, answered: str) -> str:
    """Return the reason that `prompt` is no prefix of `answered`, with an excerpt of both around the place where they differ."""
    at = in_common(prompt, answered)
    begin = max(0, at - EXCERPT_CHARACTERS // 2)
    excerpts = [repr(text[begin : begin + EXCERPT_CHARACTERS]) for text in (prompt, answered)]
    return (
        "the chat template writes another text for this turn than a server would prompt with: the prompt goes on "
        f"{excerpts[0]}, the conversation {excerpts[1]}"
    )


def _tail(text: str) -> str:
    return repr(text[-EXCERPT_CHARACTERS // 2 :])
