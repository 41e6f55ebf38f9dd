"""An encoder that scores windows of a text: an export of dstune, or any classifier in a folder."""

from __future__ import annotations

import re
import threading
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dstune.config.names import nearest
from dstune.core.errors import Problem, UserError
from dstune.guard.calibration import ATTACK, CALIBRATES, SMALLEST_PART, Calibration, digest_of, wrong_windows
from dstune.guard.variants import Variant

if TYPE_CHECKING:
    import torch

    from dstune.inference.predictor import Predictor

WINDOW, STRIDE = 128, 96
"""Of a model that is not calibrated."""
BATCH = 16
"""Rows that are computed together."""
WINDOW_TO_PART = 4
"""A part is a quarter of a window, where nobody says otherwise."""

LONG = 3
"""From so many windows on, a text is a long one: most are documents, or have one within. Its suspicious windows are read again in
parts, and it counts in the calibration of every direction."""


class Window(NamedTuple):
    ids: list[int]
    """Of the tokens, special ones included."""
    of_long: bool = False
    """Whether it is one of at least `LONG` of its reading, or of an answer that is checked piece by piece."""


class WindowScore(NamedTuple):
    value: float
    """From 0 to 1."""
    alone: float
    """The probability of the label in the window as a whole: `value`, unless the window was read again."""
    parts: float = 0.0
    """Work for its parts, in windows of full length."""


@dataclass(frozen=True)
class Score:
    """Of a text: the highest of its windows and those of its variants."""

    value: float
    windows: int
    """All that were scored: what the thresholds depend on."""
    variant: str = "plain"
    """The reading with the highest window."""


@dataclass
class GuardModel:
    """A classifier that scores windows by the probability of one label (`score_windows`)."""

    predictor: Predictor
    index: int
    label: str
    digest: str
    calibration: Calibration | None
    """None where the folder has no `guard.json`: such a model may flag, never block."""
    window_tokens: int
    stride: int
    part_tokens: int = 0
    """Of the parts in which a suspicious window is read again, without special tokens. 0: it is not."""
    several_labels: bool = False
    """Whether each label has a probability of its own."""
    _tokenizing: threading.Lock = field(default_factory=threading.Lock, repr=False)
    """A tokenizer keeps how it cuts: two threads cannot use it at once."""

    @staticmethod
    def load(
        path: str | Path,
        *,
        label: str | None = None,
        window_tokens: int | None = None,
        stride: int | None = None,
        part_tokens: int | None = None,
        calibrated: bool = True,
    ) -> GuardModel:
        """Return the model in a folder, with what its `guard.json` says of label, windows and parts unless it is given here.

        calibrated: whether to read `guard.json`; a model is loaded without it to be calibrated anew.
        Raises UserError where there is no classifier, or its `guard.json` is damaged or of other weights.
        """
        import tempfile

        from dstune.config.schema import ModelConfig
        from dstune.inference.load import find, load

        folder = Path(path)
        calibration = Calibration.load(folder) if calibrated else None
        window = window_tokens if window_tokens is not None else calibration.window_tokens if calibration else WINDOW
        own_stride = calibration.stride if calibration else min(STRIDE, window * 3 // 4)
        step = stride if stride is not None else own_stride
        if part_tokens is not None:
            part = part_tokens
        elif calibration is not None:
            part = calibration.part_tokens
        else:  # without thresholds a model is judged by its probability alone
            part = 0 if calibrated else max(window // WINDOW_TO_PART, SMALLEST_PART)
        if wrong := wrong_windows(window, step, part):
            key, reason = wrong
            raise UserError(Problem(f"--{key.replace('_', '-')}", reason))
        request = find(ModelConfig(path=str(folder)), "last", [])
        with tempfile.TemporaryDirectory(prefix="dstune-guard-") as scratch:
            predictor = load(request, Path(scratch))
        name = label or (calibration.label if calibration else _label_of(predictor.labels, folder))
        if name not in predictor.labels:
            near = nearest(name, predictor.labels)
            reason = f"has no label {name!r}; its labels are {', '.join(predictor.labels) or 'none'}"
            raise UserError(Problem(str(folder), reason, (near and f"did you mean {near}?") or ""))
        model_config: Any = predictor.model.config
        longest = getattr(model_config, "max_position_embeddings", None) or window
        if window > longest:
            reason = f"windows of {window} tokens are longer than the {longest} that the model takes"
            raise UserError(Problem(str(folder), reason, f"--window-tokens {longest} or fewer"))
        # Windows cut the text: that the tokenizer has more tokens than the model takes is nothing to warn of.
        predictor.tokenizer.model_max_length = int(1e9)
        several = model_config.problem_type == "multi_label_classification"
        index = predictor.labels.index(name)
        skip_unread_positions(predictor.model)
        model = GuardModel(predictor, index, name, digest_of(folder), calibration, window, step, part, several)
        if part and model._special_tokens is None:
            reason = "has a tokenizer that makes no token of a letter, so windows cannot be read in parts"
            raise UserError(Problem(str(folder), reason, f"{CALIBRATES} {folder} --part-tokens 0"))
        return model

    def windows(self, text: str, windows_before: int = 0) -> list[Window]:
        """Cut pieces of `window_tokens` tokens that begin `stride` tokens apart. None of a text without tokens.

        windows_before: windows of the same answer that were scored already.

        A special token that somebody wrote is tokens of its characters, and symbols and very long words are set apart.
        """
        text = _readable_words(text)
        tokenizer: Any = self.predictor.tokenizer
        content = self.window_tokens - tokenizer.num_special_tokens_to_add(pair=False)
        with self._tokenizing:
            windows = tokenizer(
                text,
                truncation=True,
                max_length=self.window_tokens,
                stride=max(content - self.stride, 0),
                return_overflowing_tokens=True,
                split_special_tokens=True,
                return_attention_mask=False,
                return_token_type_ids=False,
            )["input_ids"]
        special = self.window_tokens - content
        return [Window(ids, windows_before + len(windows) >= LONG) for ids in windows if len(ids) > special]

    def tail(self, text: str, tokens: int) -> str:
        """Return the end of `text` that is so many tokens."""
        text = text[-40 * tokens :]
        tokenizer = self.predictor.tokenizer
        with self._tokenizing:
            places = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        return text[places[-tokens][0] :] if len(places) > tokens else text

    def score_windows(self, windows: Sequence[Window]) -> list[WindowScore]:
        """Return the score of each window: the probability of the label.

        A window of a long text that has more than 0.5 is read again in parts that overlap by half. Its score is then the sigmoid
        of the mean of two log-odds, of the whole and of the part that looks most like an attack, and at least 0.5, so that it
        stays above windows that were not read again: a short attack stands out in its part, and what only makes an impression as
        a whole does not.
        """
        import torch

        alone = self._log_odds([window.ids for window in windows])
        odds, work = list(alone), [0.0] * len(windows)
        again = [number for number, window in enumerate(windows) if window.of_long and alone[number] > 0]
        parts = {number: window_parts for number in again if (window_parts := self._parts(windows[number].ids))}
        part_odds = iter(self._log_odds([part for window_parts in parts.values() for part in window_parts]))
        for number, window_parts in parts.items():
            odds[number] = max((alone[number] + max(next(part_odds) for _ in window_parts)) / 2, 0.0)
            work[number] = sum(map(len, window_parts)) / self.window_tokens
        values, whole = torch.tensor([odds, alone], dtype=torch.float64).sigmoid().tolist()
        return list(map(WindowScore, values, whole, work))

    def _parts(self, ids: list[int]) -> list[list[int]]:
        """Return pieces of `part_tokens` tokens, each with the special tokens. Empty for a window no longer than one piece."""
        tokens_before, tokens_after = self._special_tokens or (0, 0)
        size, end = self.part_tokens, len(ids) - tokens_after
        if not size or end - tokens_before <= size:
            return []
        step = size // 2
        starts = range(tokens_before, end - size + step, step)
        return [ids[:tokens_before] + ids[start : min(start + size, end)] + ids[end:] for start in starts]

    @cached_property
    def _special_tokens(self) -> tuple[int, int] | None:
        """How many stand before and after a text. None where a text of one letter has no token."""
        tokenizer: Any = self.predictor.tokenizer
        with self._tokenizing:
            mask = tokenizer("a", return_special_tokens_mask=True)["special_tokens_mask"]
        return (mask.index(0), mask[::-1].index(0)) if 0 in mask else None

    def _log_odds(self, rows: Sequence[list[int]]) -> list[float]:
        """Return ln(p / (1 - p)) of the label in each row of token ids."""
        import torch

        order = sorted(range(len(rows)), key=lambda number: len(rows[number]))
        odds = [0.0] * len(rows)
        for start in range(0, len(order), BATCH):
            chosen = order[start : start + BATCH]
            longest = len(rows[chosen[-1]])
            padding = int(self.predictor.tokenizer.pad_token_id or 0)
            ids = torch.full((len(chosen), longest), padding)
            mask = torch.zeros((len(chosen), longest), dtype=torch.long)
            for row, number in enumerate(chosen):
                ids[row, : len(rows[number])] = torch.tensor(rows[number])
                mask[row, : len(rows[number])] = 1
            device = next(self.predictor.model.parameters()).device
            with torch.inference_mode():
                logits = self.predictor.model(input_ids=ids.to(device), attention_mask=mask.to(device)).logits.double()
            label_logits = logits[:, self.index]
            if not self.several_labels:
                others = [number for number in range(logits.shape[1]) if number != self.index]
                label_logits = label_logits - logits[:, others].logsumexp(dim=1)
            for number, value in zip(chosen, label_logits.tolist(), strict=True):
                odds[number] = value
        return odds

    def scores(self, texts: Sequence[str]) -> list[list[WindowScore]]:
        """Return the score of each window of each text, as the texts are: neither normalised nor decoded."""
        windows = [self.windows(text) for text in texts]
        flat = iter(self.score_windows([window for of_text in windows for window in of_text]))
        return [[next(flat) for _ in of_text] for of_text in windows]


def skip_unread_positions(model: Any) -> bool:
    """Let the last layer of a BERT-like encoder go on with the first position alone where the head reads no other.

    The output projection and the feed-forward part of that layer are 9/12 of it: an eighth of the time of six layers.
    The logits of a sample must stay what they were; otherwise, and of any other architecture, the model stays as it is.
    Returns whether it was changed.
    """
    import torch

    layers = getattr(getattr(model.base_model, "encoder", None), "layer", None)
    output = getattr(getattr(layers[-1], "attention", None), "output", None) if layers else None
    if output is None:
        return False
    with torch.inference_mode():
        try:
            logits_before = _samples_logits(model)
        except Exception:  # of a model that takes other inputs
            return False
        handle = output.register_forward_pre_hook(lambda _, states: tuple(state[:, :1] for state in states))
        try:
            after = _samples_logits(model)
            is_same = all(
                first.ndim == 2 and torch.allclose(first, other, atol=1e-6)
                for first, other in zip(logits_before, after, strict=True)
            )
        except Exception:  # of a head that reads further positions, in words of its own
            is_same = False
    if not is_same:
        handle.remove()
    return is_same


def _samples_logits(model: Any) -> list[torch.Tensor]:
    """Return logits of rows of odd and even lengths, in fp32."""
    import torch

    longest = min(16, getattr(model.config, "max_position_embeddings", None) or 16)
    device, logits = next(model.parameters()).device, []
    for length in sorted({1, 3, longest - 1, longest} - {0}):
        ids = torch.arange(1, length + 1, device=device).remainder(model.config.vocab_size)[None]
        logits.append(model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.float())
    return logits


_NO_LETTER = re.compile(r"[^\w\s\x00-\x7f]")
LONGEST_WORD = 90
"""Of more than 100 characters a tokenizer of BERT's makes one unknown token, and of a word with a symbol that it does not know."""


def _readable_words(text: str) -> str:
    if not text.isascii():
        text = _NO_LETTER.sub(_apart, text)
    return _LONG_WORD.sub(r"\g<0> ", text)


_LONG_WORD = re.compile(rf"[^\s!-/:-@\[-`{{-~]{{{LONGEST_WORD}}}(?=\S)")


def _apart(match: re.Match[str]) -> str:
    sign = match.group()
    return f" {sign} " if unicodedata.category(sign)[0] == "S" else sign


def highest(readings: Sequence[Variant], scores: Sequence[Sequence[WindowScore]]) -> Score:
    """Return the score of a text from those of the windows of its readings."""
    best = Score(0.0, sum(map(len, scores)))
    for reading, windows in zip(readings, scores, strict=True):
        value = max((window.value for window in windows), default=0.0)
        if value > best.value:
            best = Score(value, best.windows, reading.name)
    return best


def _label_of(labels: Sequence[str], folder: Path) -> str:
    """Choose the label of a model that is not calibrated: `attack`, or the second of two labels."""
    if ATTACK in labels:
        return ATTACK
    if len(labels) == 2:
        return labels[1]
    reason = f"which of its labels means an attack is not known: {', '.join(labels) or 'it has none'}"
    raise UserError(Problem(str(folder), reason, f"{CALIBRATES} {folder} --label LABEL"))
