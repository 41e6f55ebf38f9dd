"""Turns the teacher's answers into rows, independent of the order in which the answers came."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dstune.data.unread import SYNTHETIC
from dstune.synthesize import filters
from dstune.synthesize.filters import RUN_WORDS, Judged
from dstune.synthesize.grading import Graders
from dstune.synthesize.journal import Answer
from dstune.synthesize.requests import Draft, Item, Kind, Unusable

if TYPE_CHECKING:
    from dstune.data.clean.held_out import HeldOutTexts

UNFINISHED = {"length": "cut off", "content_filter": "stopped by the server's content filter"}
"""Reasons for leaving an answer out, by its `finish_reason`."""


@dataclass(frozen=True)
class Settings:
    """Settings of the filters."""

    keep_refusals: bool = False
    languages: tuple[str, ...] = ()
    held_out: HeldOutTexts | None = None
    agreement: float | None = None
    near: float | None = None

    @classmethod
    def of(cls, arguments: argparse.Namespace, held_out: Sequence[Sequence[str]]) -> Settings:
        """Return the settings that the flags select. held_out: the texts of each held-out row.

        Raises UserError for unknown languages, and for a package that a filter needs and that is missing.
        """
        languages = tuple(code.strip() for code in (arguments.languages or "").split(",") if code.strip())
        if languages:
            from dstune.data.clean.language import check_languages

            check_languages(list(languages))
        held_out_texts = None
        if arguments.held_out:
            from dstune.data.clean.held_out import HeldOutTexts

            held_out_texts = HeldOutTexts(held_out, RUN_WORDS, "--held-out")
        return cls(arguments.keep_refusals, languages, held_out_texts, arguments.agreement, arguments.near)


@dataclass
class Synthesis:
    """The rows of a synthesis, and those left out."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    left_out: list[dict[str, Any]] = field(default_factory=list)
    reasons: Counter[str] = field(default_factory=Counter)
    contaminated: int | None = None
    """Rows that repeat a held-out text, counted after all other filters; None if there are no held-out texts."""


def make_rows(
    kind: Kind,
    items: Sequence[Item],
    samples: int,
    answers: Mapping[str, Answer],
    settings: Settings,
    graders: Graders,
) -> Synthesis:
    """Return the rows to keep and those left out. Raises UserError; ServerUnreachable for the reward model."""
    made = Synthesis()
    judged: list[Judged] = []
    for item in items:
        for sample in range(samples):
            answer = answers.get(f"{item.number}/{sample}")
            if answer is None:
                continue
            if answer.finish in UNFINISHED:
                _leave_out(made, UNFINISHED[answer.finish], item, answer)
                continue
            try:
                judged += [Judged(draft) for draft in kind.drafts(item, answer.text, sample)]
            except Unusable as error:
                _leave_out(made, str(error), item, answer)
    _filter(judged, settings, graders, compares=kind.compares)
    if kind.compares:
        judged = _paired(judged, graders)
        filters.leave_out_duplicates(judged, settings.near)
    for row in judged:
        provenance = _provenance(row, answers)
        if row.reason:
            made.reasons[_shortened(row.reason)] += 1
            made.left_out.append({"reason": row.reason, **row.draft.row, SYNTHETIC: provenance})
        else:
            made.rows.append({**row.draft.row, SYNTHETIC: provenance})
    if settings.held_out is not None:
        still = [Judged(row.draft) for row in filters.staying(judged)]
        filters.leave_out_contaminated(still, settings.held_out)
        made.contaminated = sum(bool(row.reason) for row in still)
    return made


def _filter(judged: list[Judged], settings: Settings, graders: Graders, *, compares: bool) -> None:
    if not settings.keep_refusals:
        filters.leave_out_refusals(judged)
    if settings.languages:
        filters.leave_out_languages(judged, settings.languages)
    if settings.held_out is not None:
        filters.leave_out_contaminated(judged, settings.held_out)
    for name, least in graders.least.items():
        drafts = [row.draft for row in filters.staying(judged)]
        # the worse answer of a pair may be as bad as it is
        filters.leave_out_low_scores(judged, name, graders.score(name, drafts), None if compares else least)
    if graders.reward_model is not None:
        drafts = [row.draft for row in filters.staying(judged)]
        least = None if compares else graders.reward_least
        filters.leave_out_low_scores(judged, "reward_model", graders.score_by_model(drafts), least)
    if settings.agreement is not None:
        filters.leave_out_disagreeing(judged, settings.agreement)
    if not compares:
        filters.leave_out_duplicates(judged, settings.near)


def _paired(judged: Sequence[Judged], graders: Graders) -> list[Judged]:
    """Return the best and the worst answer to each prompt, by the sum of their scores, together with the answers left out
    before."""
    names = [*graders.least, *(["reward_model"] if graders.reward_model is not None else [])]
    pairs: list[Judged] = [judged_row for judged_row in judged if judged_row.reason]
    groups: dict[int, list[Judged]] = {}
    for judged_row in filters.staying(judged):
        groups.setdefault(judged_row.draft.item.number, []).append(judged_row)
    for group in groups.values():
        ordered = sorted(group, key=lambda judged_row: -sum(judged_row.scores[name] for name in names))
        best, worst = ordered[0], ordered[-1]
        totals = [sum(judged_row.scores[name] for name in names) for judged_row in (best, worst)]
        *prompt, chosen = best.draft.row["messages"]
        row = {"prompt": prompt, "chosen": [chosen], "rejected": [worst.draft.row["messages"][-1]]}
        draft = Draft(
            row, best.draft.prompt, best.draft.answer, best.draft.item, best.draft.samples + worst.draft.samples
        )
        scores = {"chosen": totals[0], "rejected": totals[1]}
        least = [*graders.least.items(), ("reward_model", graders.reward_least)]
        low = [name for name, bound in least if bound is not None and best.scores.get(name, bound) < bound]
        reason = "all answers have the same score" if totals[0] == totals[1] else ""
        pairs.append(Judged(draft, scores, f"{low[0]} of the best answer is too low" if low else reason))
    return pairs


def _provenance(row: Judged, answers: Mapping[str, Answer]) -> dict[str, Any]:
    item = row.draft.item
    used = [answers[f"{item.number}/{sample}"] for sample in row.draft.samples]
    return {
        "model": used[0].model,
        "version": used[0].version,
        "input": item.place,
        "item": item.number,
        "samples": list(row.draft.samples),
        "seeds": [answer.seed for answer in used],
        "scores": row.scores,
    }


def _leave_out(made: Synthesis, reason: str, item: Item, answer: Answer) -> None:
    made.reasons[reason] += 1
    made.left_out.append({"reason": reason, "input": item.place, "answer": answer.text, "seed": answer.seed})


def _shortened(reason: str) -> str:
    """Return the reason without the score of the individual row."""
    name, separator, _ = reason.partition(" below ")
    return f"{name.rpartition(' ')[0]} too low" if separator else reason
