"""Encode samples of language models: every token has a label, usually the token itself or none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import datasets
import numpy as np

from dstune.config.architectures import vision_of
from dstune.core.errors import Problem, UserError
from dstune.data.chat.boundary import Boundaries, BoundaryError
from dstune.data.chat.evidence import Exchange
from dstune.data.chat.rule import Place, Span
from dstune.data.chat.targets import require_offsets, target_mask
from dstune.data.collate import NO_TARGET
from dstune.data.control import ControlTokens, Defused
from dstune.data.images.expand import Expanded, count_to, expand
from dstune.data.images.places import COLUMN
from dstune.data.images.processor import processor_of
from dstune.data.preferences import as_chat
from dstune.data.problems import RowError
from dstune.data.render import ChatRenderer, Choice, RenderError
from dstune.data.special_tokens import first_special_tokens
from dstune.data.tokenize.sample import Encoder, Rows, Sample

NUMBERS = datasets.List(datasets.Value("int32"))


class Language(Encoder):
    """Common base of the encoders of chats and documents. Raises UserError (at creation) without an end-of-sequence token.

    The column `bytes` is the UTF-8 length of the text of a sample's targets, not counting special tokens; 0 if the tokenizer
    gives no offsets.
    """

    def __init__(self, tokenizer: Any, max_length: int):
        self._end = self._end_of(tokenizer)
        self._tokenizer = tokenizer
        self._max_length = max_length
        self._control = ControlTokens(tokenizer)
        self._boundaries = Boundaries(tokenizer, self._control)
        self._prefix = first_special_tokens(tokenizer)
        added = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._special = np.array(sorted({*tokenizer.all_special_ids, *added}), dtype=np.int64)

    @staticmethod
    def _end_of(tokenizer: Any) -> int:
        """Return the id of the token that ends a text."""
        if tokenizer.eos_token_id is None:
            raise UserError(
                Problem(
                    where="model.path",
                    reason="the tokenizer has no end-of-sequence token, so the model could not learn to stop",
                    fix="choose a model made to generate text",
                )
            )
        return int(tokenizer.eos_token_id)

    @property
    def columns(self) -> Mapping[str, Any]:
        return {"labels": NUMBERS, "bytes": datasets.Value("int64"), **self.image_columns}

    @property
    def image_columns(self) -> Mapping[str, Any]:
        """The column with the numbers of a sample's images; empty if no row has images."""
        return {COLUMN: NUMBERS} if self.images else {}

    def plain_prompt_ids(self, text: str) -> list[int]:
        """Return the token ids of a text for the model to continue: with the first special tokens, without an end token."""
        ids = self._control.ids(text, self._own_tokens(text, end=None))
        return [*self._missing_prefix(ids), *ids]

    def _sample(
        self,
        number: int,
        input_ids: np.ndarray,
        targets: np.ndarray,
        sizes: np.ndarray,
        problem: str,
        labels: np.ndarray | None = None,
        images: Sequence[tuple[int, int, int]] = (),
    ) -> Sample:
        """Make a sample. targets: whether each token is trained. sizes: bytes of text that each token stands for. labels: the token
        ids to predict, if they differ from the inputs. images: (first token, token after the last, number) of each image."""
        targets[:1] = False  # nothing precedes the first token, so nothing predicts it
        labels = np.where(targets, input_ids if labels is None else labels, NO_TARGET).astype(np.int32)
        if not problem and not targets.any():
            problem = "no trainable token"
        length = len(input_ids)
        span = slice(0, self._max_length)
        counted = labels[span] != NO_TARGET
        columns = {"labels": labels[span], "bytes": int(sizes[span][counted].sum())}
        if self.images is not None:
            columns[COLUMN] = np.array([image for _, end, image in images if end <= self._max_length], dtype=np.int32)
            if cut := next(((start, end) for start, end, _ in images if start < self._max_length < end), None):
                problem = (
                    problem
                    or f"data.max_length={self._max_length} cuts through an image of tokens {cut[0]} to {cut[1]}"
                )
        weight = int(np.count_nonzero(counted))
        return Sample(number, input_ids[span], columns, weight, length > self._max_length, problem, length)

    def _sizes(self, ids: np.ndarray, offsets: Any, text: str) -> np.ndarray:
        """Return the bytes of `text` that each token stands for, int64 [tokens]: from the end of the token before it to its own."""
        if not len(ids) or len(offsets) != len(ids):
            return np.zeros(len(ids), dtype=np.int64)
        byte_at = np.zeros(len(text) + 1, dtype=np.int64)
        codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
        np.cumsum(1 + (codes > 0x7F) + (codes > 0x7FF) + (codes > 0xFFFF), out=byte_at[1:])
        # The tokens of one character have the same end: the first one counts its bytes, the others none.
        ends = np.maximum.accumulate(byte_at[np.asarray(offsets, dtype=np.int64)[:, 1]])
        sizes = np.diff(ends, prepend=0)
        sizes[np.isin(ids, self._special)] = 0
        return sizes

    def _own_tokens(self, text: str, end: str | None) -> list[int]:
        """Return where a document starts with the first special token or stops with `end`, which it would get anyway: there they
        are control tokens and not text."""
        first = [0] if self._prefix and text.startswith(self._tokenizer.decode(self._prefix)) else []
        return [*first, *([len(text) - len(end)] if end and text.endswith(end) else [])]

    def _missing_prefix(self, ids: list[int]) -> list[int]:
        """Return the first special tokens, unless the text already begins with them."""
        return [] if ids[: len(self._prefix)] == self._prefix else self._prefix


NOTHING = np.empty(0, dtype=np.int32), np.empty((0, 2), dtype=np.int64)
"""Token ids and offsets of an empty text."""


@dataclass(frozen=True)
class _Text:
    """A text to tokenize, and which parts of it are trained."""

    text: str = ""
    places: tuple[Place, ...] = ()
    untrained: list[Span] | None = None
    """With `train_on_prompt`: the spans that are not trained; everything else is."""
    own: list[int] | None = None
    """Where the template's own control tokens begin, if the row contains such strings."""
    images: tuple[tuple[int, int, int], ...] = ()
    """(first character, character after the last, number) of each image."""
    problem: str = ""


class ChatEncoder(Language):
    """Encodes conversations. Prompts and completions go through the chat template if there is one, otherwise they are concatenated.

    If the template rewrites the history of a conversation, its row gives several consecutive samples.
    """

    scores = False
    """Whether the model scores conversations instead of writing them."""

    one_sample = False
    """Whether a row must give exactly one sample."""

    def __init__(
        self,
        tokenizer: Any,
        template_date: str | None,
        fmt: str,
        max_length: int,
        *,
        train_on_prompt: bool = False,
        arguments: Mapping[str, Any] | None = None,
        choice: Choice | None = None,
    ):
        require_offsets(tokenizer)
        if fmt == "messages" or tokenizer.chat_template:
            choice = replace(choice or Choice(), whole=self.scores)
            self.renderer = ChatRenderer(tokenizer, template_date, arguments, choice)
        self.trains_on_prompt = train_on_prompt
        super().__init__(tokenizer, max_length)

    def __call__(self, rows: Rows, numbers: list[int]) -> list[Sample]:
        texts = [self._texts(row) for row in rows]
        encoded = self._tokenizer(
            [text.text for of_row in texts for text in of_row],
            add_special_tokens=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        tokens = zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
        samples = []
        for number, of_row in zip(numbers, texts, strict=True):
            earlier: list[np.ndarray] = []
            samples_of_row = [
                sample for text in of_row for sample in self._samples(number, text, *next(tokens), earlier)
            ]
            if self.one_sample and len(samples_of_row) > 1:
                reason = "the chat template rewrites earlier turns of the answer, which cannot be compared then"
                samples_of_row = [self._of_tokens(number, _Text(problem=reason), *NOTHING)]
            samples += samples_of_row
        return samples

    def exchanges(self, row: dict[str, Any]) -> list[Exchange]:
        """Return the conversations of a row, for comparison with its samples."""
        return [self._exchange(row)]

    def _exchange(self, row: dict[str, Any], prefix: str = "", sample: int | None = None) -> Exchange:
        template_columns: dict[str, Any] = {key: row[key] for key in ("tools", "chat_template_kwargs") if key in row}
        return Exchange({"messages": conversation(row), **template_columns}, prefix, sample)

    def _samples(
        self, number: int, text: _Text, ids: list[int], places: list[tuple[int, int]], earlier: list[np.ndarray]
    ) -> list[Sample]:
        """Return the sample of a text, and separate samples of turns that a server would tokenize differently: their first token
        merges with the end of the prompt, or (if the template ends turns with text) their end merges with what follows.

        earlier: token ids of the row's samples so far; with `train_on_prompt`, those of this sample are appended.
        """
        offsets = np.array(places, dtype=np.int64).reshape(-1, 2)
        if text.own is not None:
            ids, offsets = self._control.neutral(ids, places, text.text, text.own)
        input_ids = np.array(ids, dtype=np.int32)
        if text.untrained is not None:
            targets = target_mask(offsets, _between(text.untrained, len(text.text)))
            targets[: max((_in_common(input_ids, others) for others in earlier), default=0)] = False
            earlier.append(input_ids)
            whole = replace(text, places=tuple(replace(place, spans=()) for place in text.places))
            return [self._of_tokens(number, whole, input_ids, offsets, targets)]
        apart = [
            place
            for place in text.places
            if not self.scores
            and (
                self._boundaries.cuts_token(offsets, place.end)
                or not self._boundaries.is_clean(text.text, input_ids, offsets, place.start, text.own)
            )
        ]
        remaining_text = replace(text, places=tuple(place for place in text.places if place not in apart))
        samples = (
            [self._of_tokens(number, remaining_text, input_ids, offsets)] if remaining_text.places or not apart else []
        )
        for place in apart:
            cuts = self._boundaries.cuts_token(offsets, place.end)
            ended = self._boundaries.until(text.text, place.start, place.end, text.own) if cuts else None
            try:
                joined, own_offsets, count = ended or self._boundaries.apart(
                    text.text, input_ids, place.start, place.end, text.own
                )
            except BoundaryError as error:
                return [self._of_tokens(number, _Text(problem=str(error)), *NOTHING)]
            targets = np.arange(len(joined)) >= count
            alone = replace(text, places=(place,))
            samples.append(self._of_tokens(number, alone, joined, own_offsets, targets))
        return samples

    def _of_tokens(
        self, number: int, text: _Text, input_ids: np.ndarray, offsets: np.ndarray, within: np.ndarray | None = None
    ) -> Sample:
        """Return the sample of these tokens. Targets are the tokens of `text.places` that are also in `within`, bool [tokens]; if
        the places have no spans, all tokens in `within`."""
        sizes = self._sizes(input_ids, offsets, text.text)
        labels = input_ids.copy()
        spans = [span for place in text.places for span in place.spans]
        targets = target_mask(offsets, spans)
        if within is not None:
            targets = targets & within if spans else within
        for place in text.places:
            if place.label is not None:
                label_end, stop = place.label
                labels[np.searchsorted(offsets[:, 1], label_end, side="right")] = self._tokenizer.convert_tokens_to_ids(
                    stop
                )
        if self.renderer is None and not text.problem:
            prefix = self._missing_prefix(input_ids.tolist())
            input_ids = np.array([*prefix, *input_ids, self._end], dtype=np.int32)
            labels = np.array([*prefix, *labels, self._end], dtype=np.int32)
            targets = np.concatenate([np.full(len(prefix), self.trains_on_prompt), targets, [True]])
            sizes = np.concatenate([np.zeros(len(prefix), dtype=np.int64), sizes, [0]])
        images = _tokens_of(text.images, offsets)
        for start, behind, _ in images:
            targets[start:behind] = False  # images are inputs, which the model never writes
        return self._sample(number, input_ids, targets, sizes, text.problem, labels, images)

    def _texts(self, row: dict[str, Any]) -> list[_Text]:
        """Return the texts of a row, or a single one with the row's problem."""
        defused: Defused | None = None
        try:
            self._control.refuse_across_parts(row)
            defused = self._control.defuse(row) if self._control.first(row) else None
            texts = self._rendered(defused.value if defused else row)
            if row.get(COLUMN):
                texts = self._expanded(texts, row)
        except (RenderError, RowError) as error:
            return [
                _Text(
                    problem=defused.unrestored().sub("...", defused.restore(str(error))[0]) if defused else str(error)
                )
            ]
        if defused is None:
            return texts
        restored = [(text, *defused.restore(text.text)) for text in texts]
        if any(defused.unrestored().search(written) for _, written, _ in restored):
            return [_Text(problem="the chat template cuts or escapes a text that reads like a control token")]
        return [replace(text, text=written, own=control_starts) for text, written, control_starts in restored]

    def _expanded(self, texts: list[_Text], row: dict[str, Any]) -> list[_Text]:
        """Return `texts` with the placeholders of each image expanded. Raises RowError for an image that cannot be decoded, and if
        the places that the template prints differ from the row's."""
        vision = vision_of(self._tokenizer)
        assert self.images is not None and vision is not None, "ingest refuses images that nobody sees"
        if self.renderer is None:
            raise RowError("the row holds an image, and the model has no chat template that says where it stands")
        processor = processor_of(vision)
        expansions = []
        for place, image in enumerate(row[COLUMN], 1):
            try:
                self.images.image(image["number"])
                expansions.append(processor.expansion(*image["size"]))
            except RowError as error:
                raise RowError(f"image {place} {error}") from None
        numbers = [image["number"] for image in row[COLUMN]]
        expanded_texts = []
        for text in texts:
            if text.problem:
                expanded_texts.append(text)
                continue
            last = text.places[-1].number if text.places else 0
            expected = count_to(conversation(row), last)
            expanded = expand(text.text, processor.placeholder, expansions, expected)
            expanded_texts.append(_moved(text, expanded, numbers))
        return expanded_texts

    def _rendered(self, row: dict[str, Any]) -> list[_Text]:
        if self.renderer is None:
            text, start = row["prompt"] + row["completion"], len(row["prompt"])
            place = Place(0, start, len(text), len(text), ((start, len(text)),))
            return [_Text(text, (place,), [] if self.trains_on_prompt else None)]
        options = {"tools": row.get("tools"), "arguments": row.get("chat_template_kwargs")}
        if self.trains_on_prompt:
            passages_and_untrained = self.renderer.whole_and_untrained(conversation(row), **options)
            return [_Text(passage.text, passage.places, untrained) for passage, untrained in passages_and_untrained]
        passages = self.renderer.passages(conversation(row), **options)
        return [_Text(passage.text, passage.places) for passage in passages] or [_Text(problem="no trainable token")]


def conversation(row: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the messages of a chat row: a prompt and its completion are two messages; a pair gives those of the better answer."""
    if "chosen" in row:
        row = as_chat(row, "chosen")
    if "messages" in row:
        return row["messages"]
    return [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]


def _tokens_of(images: Sequence[tuple[int, int, int]], offsets: np.ndarray) -> list[tuple[int, int, int]]:
    """Return (first token, token after the last, number) of each image in the text of these tokens."""
    end = int(offsets[-1, 1]) if len(offsets) else 0
    starts = offsets[:, 0]
    return [
        (int(np.searchsorted(starts, first)), int(np.searchsorted(starts, behind)), number)
        for first, behind, number in images
        if behind <= end
    ]


def _moved(text: _Text, expanded: Expanded, numbers: Sequence[int]) -> _Text:
    """Return `text` with its images expanded; all its character positions refer to the longer text."""

    def span(old_span: Span) -> Span:
        return expanded.moved(old_span[0]), expanded.moved(old_span[1])

    places = tuple(
        replace(
            place,
            start=expanded.moved(place.start),
            body_end=expanded.moved(place.body_end),
            end=expanded.moved(place.end),
            spans=tuple(map(span, place.spans)),
            label=None if place.label is None else (expanded.moved(place.label[0]), place.label[1]),
        )
        for place in text.places
    )
    untrained = None if text.untrained is None else list(map(span, text.untrained))
    images = tuple((*where, number) for where, number in zip(expanded.spans, numbers, strict=False))
    return replace(text, text=expanded.text, places=places, untrained=untrained, images=images)


def _in_common(first: np.ndarray, second: np.ndarray) -> int:
    """Return how many tokens the two sequences have in common at the start."""
    length = min(len(first), len(second))
    different = np.flatnonzero(first[:length] != second[:length])
    return int(different[0]) if len(different) else length


def _between(spans: list[Span], length: int) -> list[Span]:
    """Return the parts of a text of `length` characters outside of `spans`, including a token without characters at its end."""
    edges = [0, *(edge for span in spans for edge in span), length + 1]
    return [(start, end) for start, end in zip(edges[::2], edges[1::2], strict=True) if start < end]
