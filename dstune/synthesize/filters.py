"""Filters of drafts. Each filter sets a reason on the drafts that it removes, and may set a score on others."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dstune.data.clean.words import words_in
from dstune.rewards.answers import boxed, last_number
from dstune.synthesize.requests import Draft

if TYPE_CHECKING:
    from dstune.data.clean.held_out import HeldOutTexts

RUN_WORDS = 8
"""Length of a run of words that a draft may not share with a held-out text."""

REFUSALS = re.compile(
    r"^\W*(?:(?:i(?:'|\u2019)?m|i am) (?:really |very |so )?(?:sorry|unable|not able|afraid)|sorry[,.]? (?:but )?i|"
    r"i (?:cannot|can(?:'|\u2019)?t|can not|won(?:'|\u2019)?t|will not|must decline)|as an ai\b|"
    r"(?:es )?tut mir leid|ich kann (?:das|dabei|ihnen|dir)? ?nicht|je suis d\u00e9sol\u00e9|je ne peux pas|"
    r"lo siento|no puedo|mi dispiace|non posso|\u5bf9\u4e0d\u8d77|\u62b1\u6b49|\u6211\u65e0\u6cd5|\u7533\u3057\u8a33)",
    re.IGNORECASE,
)
"""How models begin to refuse, in several languages."""


@dataclass
class Judged:
    """A draft with the filters' results so far."""

    draft: Draft
    scores: dict[str, float] = field(default_factory=dict)
    reason: str = ""
    """Why it is left out; empty while it stays."""


def staying(judged: Iterable[Judged]) -> Iterator[Judged]:
    return (row for row in judged if not row.reason)


def leave_out_refusals(judged: Sequence[Judged]) -> None:
    for row in staying(judged):
        if REFUSALS.match(row.draft.answer):
            row.reason = "refusal"


def leave_out_languages(judged: Sequence[Judged], languages: Sequence[str]) -> None:
    """Leave out answers that are not in one of these languages (ISO 639). Needs the extra `clean`."""
    from dstune.data.clean.language import SURE, language

    for row in staying(judged):
        code, probability = language(row.draft.answer)
        row.scores["language"] = round(probability, 4)
        if code not in languages and probability >= SURE:
            row.reason = f"language {code}"


def leave_out_low_scores(
    judged: Sequence[Judged], name: str, scores: Sequence[float | None], least: float | None
) -> None:
    """Leave out rows with a score below `least`. scores: of the remaining rows, in their order; None if the grader had no score."""
    for row, score in zip(list(staying(judged)), scores, strict=True):
        if score is None:
            row.reason = f"{name} could not score it"
            continue
        row.scores[name] = score
        if least is not None and score < least:
            row.reason = f"{name} {score:.4g} below {least:g}"


def leave_out_disagreeing(judged: Sequence[Judged], least: float) -> None:
    """Keep one answer to each request: the first with the most common final answer, if the share of that is at least `least`."""
    groups: dict[int, list[Judged]] = {}
    for row in staying(judged):
        groups.setdefault(row.draft.item.number, []).append(row)
    for group in groups.values():
        counts = Counter(final_answer(row.draft.answer) for row in group)
        common_answer, count = counts.most_common(1)[0]
        share, chosen = count / len(group), False
        for row in group:
            row.scores["agreement"] = round(counts[final_answer(row.draft.answer)] / len(group), 4)
            if share < least:
                row.reason = f"agreement {share:.2g} below {least:g}"
            elif final_answer(row.draft.answer) != common_answer or chosen:
                row.reason = "another answer stands for it"
            else:
                chosen = True


def final_answer(text: str) -> str:
    """Return the part of an answer that is compared: a box, otherwise its last number, otherwise all of its words."""
    if (content := boxed(text)) is not None:
        return re.sub(r"\s+", "", content)
    if (number := last_number(text)) is not None:
        return str(number)
    return normal(text)


def leave_out_duplicates(judged: Sequence[Judged], near: float | None) -> None:
    """Leave out all but the first of equal rows: equal in their words, numbers and signs or, with `near`, in their numbers and
    signs and in at least that share of their characters (the extra `clean`)."""
    rows = list(staying(judged))
    earlier_texts: set[str] = set()
    for row in rows:
        text = comparable(row.draft)
        if text in earlier_texts:
            row.reason = "duplicate"
        earlier_texts.add(text)
    if near is None:
        return
    import numpy as np

    from dstune.data.clean.near import SIGNATURE_NUMBERS, NearCopies, signature

    rows = list(staying(judged))
    texts = [comparable(row.draft) for row in rows]
    signatures = np.frombuffer(b"".join(map(signature, texts)), dtype=np.uint32).reshape(-1, SIGNATURE_NUMBERS)
    figures = np.array([hash(words_in(f"{row.draft.prompt}\n{row.draft.answer}").figures) for row in rows])

    def allowed(first: np.ndarray, second: np.ndarray) -> np.ndarray:
        return figures[first] == figures[second]

    copies = NearCopies(signatures, texts.__getitem__, allowed, near).find()
    for row, original in zip(rows, copies.tolist(), strict=True):
        if original >= 0:
            row.reason = "near duplicate"


def comparable(draft: Draft) -> str:
    return f"{normal(draft.prompt)}\n{normal(draft.answer)}"


def normal(text: str) -> str:
    """Return the words of a text in lower case, with its numbers and signs."""
    return words_in(text).text


def leave_out_contaminated(judged: Sequence[Judged], held_out: HeldOutTexts) -> None:
    """Leave out rows whose prompt, answer or source repeats a held-out text."""
    rows = list(staying(judged))
    prompts = held_out.repeated_in([row.draft.prompt for row in rows])
    answers = held_out.repeated_in([row.draft.answer for row in rows], are_answers=True)
    sources = held_out.repeated_in([_source(row) for row in rows], are_answers=True)
    for row, is_repeated in zip(rows, prompts | answers | sources, strict=True):
        if is_repeated:
            row.reason = "contamination"


def _source(row: Judged) -> str:
    source = row.draft.row.get("source")
    return source["text"] if isinstance(source, Mapping) else ""


def texts_in(value: Any) -> Iterator[str]:
    """Yield all texts of a row, at any depth, except the roles of messages."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for name, part in value.items():
            if name not in ("role", "synthetic"):
                yield from texts_in(part)
    elif isinstance(value, Sequence):
        for part in value:
            yield from texts_in(part)
