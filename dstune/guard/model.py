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
from dstune.guard.calibration import (
    ATTACK,
    CALIBRATE_COMMAND,
    SMALLEST_PART,
    Calibration,
    digest_of,
    invalid_window_length,
)
from dstune.guard.variants import Variant

if TYPE_CHECKING:
    import torch

    from dstune.inference.predictor import Predictor

WINDOW, STRIDE = 128, 96
"""For a model that is not calibrated."""
BATCH = 16
"""Rows per batch."""
WINDOW_TO_PART = 4
"""By default, a part is a quarter of a window."""

LONG = 3
"""A text with at least this many windows counts as long: most are documents, or contain one. Its suspicious windows are scored
again in parts, and it counts in the calibration of every direction."""


class Window(NamedTuple):
    ids: list[int]
    """Token ids, including special tokens."""
    of_long: bool = False
    """Whether its reading has at least `LONG` windows, or its answer is checked piece by piece."""


class WindowScore(NamedTuple):
    value: float
    """Between 0 and 1."""
    alone: float
    """The label's probability for the complete window; equal to `value` unless the window was scored again in parts."""
    parts: float = 0.0
    """Cost of scoring its parts, in full windows."""


@dataclass(frozen=True)
class Score:
    """The score of a text: the highest of its windows and its variants' windows."""

    value: float
    windows: int
    """The number of scored windows, on which the thresholds depend."""
    variant: str = "plain"
    """The reading that contains the highest window."""


@dataclass
class GuardModel:
    """A classifier whose score is the probability of one label (`score_windows`)."""

    predictor: Predictor
    index: int
    label: str
    digest: str
    calibration: Calibration | None
    """None if the folder has no `guard.json`: such a model may flag, but never block."""
    window_tokens: int
    stride: int
    part_tokens: int = 0
    """Tokens, without special ones, of the parts in which a suspicious window is scored again; 0 for none."""
    several_labels: bool = False
    """Whether each label has a probability of its own."""
    _tokenizing: threading.Lock = field(default_factory=threading.Lock, repr=False)
    """Truncation settings are shared state of a tokenizer, so two threads cannot use it at once."""

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
        """Load the model in a folder. Label, windows and parts come from its `guard.json` unless they are passed. calibrated:
        whether to read `guard.json`; it is skipped to calibrate a model again. Raises UserError if there is no classifier, or if
        `guard.json` is damaged or belongs to other weights."""
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
        else:  # without thresholds, the model is judged by its probability alone
            part = 0 if calibrated else max(window // WINDOW_TO_PART, SMALLEST_PART)
        if wrong := invalid_window_length(window, step, part):
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
        # Texts are cut into windows, so a tokenizer with more tokens than the model accepts needs no warning.
        predictor.tokenizer.model_max_length = int(1e9)
        several = model_config.problem_type == "multi_label_classification"
        index = predictor.labels.index(name)
        skip_unread_positions(predictor.model)
        model = GuardModel(predictor, index, name, digest_of(folder), calibration, window, step, part, several)
        if part and model._special_tokens is None:
            reason = "has a tokenizer that makes no token of a letter, so windows cannot be read in parts"
            raise UserError(Problem(str(folder), reason, f"{CALIBRATE_COMMAND} {folder} --part-tokens 0"))
        return model

    def windows(self, text: str, windows_before: int = 0) -> list[Window]:
        """Cut a text into windows of `window_tokens` tokens that start `stride` tokens apart; none if it has no tokens.
        windows_before: windows of the same answer that were scored earlier. Special tokens in the text are tokenized as characters;
        symbols and very long words are separated."""
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
        special_tokens = self.window_tokens - content
        return [Window(ids, windows_before + len(windows) >= LONG) for ids in windows if len(ids) > special_tokens]

    def tail(self, text: str, tokens: int) -> str:
        """Return the last `tokens` tokens of `text`."""
        text = text[-40 * tokens :]
        tokenizer = self.predictor.tokenizer
        with self._tokenizing:
            places = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        return text[places[-tokens][0] :] if len(places) > tokens else text

    def score_windows(self, windows: Sequence[Window]) -> list[WindowScore]:
        """Return the score of each window: the probability of the label. A window of a long text with a probability above 0.5 is
        scored again in parts that overlap by half. Its score is then the sigmoid of the mean of two log-odds, of the complete
        window and of its most suspicious part, but at least 0.5, so that it ranks above windows that were not scored again. A short
        attack stands out in its part; text that is suspicious only as a whole does not."""
        import torch

        alone = self._log_odds([window.ids for window in windows])
        odds, work = list(alone), [0.0] * len(windows)
        suspicious = [number for number, window in enumerate(windows) if window.of_long and alone[number] > 0]
        parts = {number: window_parts for number in suspicious if (window_parts := self._parts(windows[number].ids))}
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
        """Count the special tokens before and after a text; None if a text of one letter has no token."""
        tokenizer: Any = self.predictor.tokenizer
        with self._tokenizing:
            mask = tokenizer("a", return_special_tokens_mask=True)["special_tokens_mask"]
        return (mask.index(0), mask[::-1].index(0)) if 0 in mask else None

    def _log_odds(self, rows: Sequence[list[int]]) -> list[float]:
        """Return ln(p / (1 - p)) of the label for each row of token ids."""
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
        """Return the score of each window of each text. The texts are neither normalised nor decoded."""
        windows = [self.windows(text) for text in texts]
        flat = iter(self.score_windows([window for of_text in windows for window in of_text]))
        return [[next(flat) for _ in of_text] for of_text in windows]


def skip_unread_positions(model: Any) -> bool:
    """Make the last layer of a BERT-like encoder compute only the first position, if the head reads no other. The output projection
    and feed-forward network are 9/12 of that layer: an eighth of the time of six layers. The model stays unchanged if its
    architecture is unknown, or if the logits of a sample would differ. Returns whether it was changed."""
    import torch

    layers = getattr(getattr(model.base_model, "encoder", None), "layer", None)
    output = getattr(getattr(layers[-1], "attention", None), "output", None) if layers else None
    if output is None:
        return False
    with torch.inference_mode():
        try:
            logits_before = _samples_logits(model)
        except Exception:  # a model with other inputs
            return False
        handle = output.register_forward_pre_hook(lambda _, states: tuple(state[:, :1] for state in states))
        try:
            after = _samples_logits(model)
            is_same = all(
                first.ndim == 2 and torch.allclose(first, other, atol=1e-6)
                for first, other in zip(logits_before, after, strict=True)
            )
        except Exception:  # a head that reads further positions may raise anything
            is_same = False
    if not is_same:
        handle.remove()
    return is_same


def _samples_logits(model: Any) -> list[torch.Tensor]:
    """Return the logits of rows of odd and even lengths, in fp32."""
    import torch

    longest = min(16, getattr(model.config, "max_position_embeddings", None) or 16)
    device, logits = next(model.parameters()).device, []
    for length in sorted({1, 3, longest - 1, longest} - {0}):
        ids = torch.arange(1, length + 1, device=device).remainder(model.config.vocab_size)[None]
        logits.append(model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.float())
    return logits


_NO_LETTER = re.compile(r"[^\w\s\x00-\x7f]")
LONGEST_WORD = 90
"""BERT's tokenizers turn a word of more than 100 characters, or with an unknown symbol, into one unknown token."""


def _readable_words(text: str) -> str:
    if not text.isascii():
        text = _NO_LETTER.sub(_separated, text)
    return _LONG_WORD.sub(r"\g<0> ", text)


_LONG_WORD = re.compile(rf"[^\s!-/:-@\[-`{{-~]{{{LONGEST_WORD}}}(?=\S)")


def _separated(match: re.Match[str]) -> str:
    sign = match.group()
    return f" {sign} " if unicodedata.category(sign)[0] == "S" else sign


def highest(readings: Sequence[Variant], scores: Sequence[Sequence[WindowScore]]) -> Score:
    """Return the score of a text from those of its readings' windows."""
    best = Score(0.0, sum(map(len, scores)))
    for reading, windows in zip(readings, scores, strict=True):
        value = max((window.value for window in windows), default=0.0)
        if value > best.value:
            best = Score(value, best.windows, reading.name)
    return best


def _label_of(labels: Sequence[str], folder: Path) -> str:
    """Return the label of a model without calibration: `attack`, or the second of two labels."""
    if ATTACK in labels:
        return ATTACK
    if len(labels) == 2:
        return labels[1]
    reason = f"which of its labels means an attack is not known: {', '.join(labels) or 'it has none'}"
    raise UserError(Problem(str(folder), reason, f"{CALIBRATE_COMMAND} {folder} --label LABEL"))
