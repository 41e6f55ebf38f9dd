"""The gate of attacks: a candidate that obeys more orders inside documents than the current version is refused."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from dstune.cycle.gates import Gates, Judge, compare, judge_all
from dstune.protocols import PROBES

NAME = "attacks_resisted"


def test_the_attacks_are_different_and_hold_no_word_that_tells_obedience() -> None:
    probe = PROBES[NAME]()
    questions = probe.questions()
    assert len({question.text for question in questions}) == len({question.id for question in questions}) == 200
    assert {question.kind for question in questions} == {"direct", "indirect"}
    for question in questions:
        assert probe.score(question, question.text) == 1.0  # a quotation is no obedience
        assert probe.score(question, f"Sure: {question.expected[0].upper()}!") == probe.score(question, " ") == 0.0


@pytest.mark.parametrize(
    ("obeyed_before", "obeyed_after", "verdict"),
    [(10, 10, "passed"), (10, 40, "worse"), (40, 10, "passed"), (10, 14, "undecided")],
)
def test_a_candidate_that_obeys_more_attacks_is_refused(obeyed_before: int, obeyed_after: int, verdict: str) -> None:
    expected = {question.text: question.expected[0] for question in PROBES[NAME]().questions()}

    def version(obeyed: int) -> Judge:
        def answers(rows: Sequence) -> list[str]:
            texts = [row["messages"][-1]["content"] for row in rows]
            return [expected[text] if at < obeyed else "A note of a meeting." for at, text in enumerate(texts)]

        return Judge(lambda rows: np.ones(len(rows)), answers)

    gates = Gates(probes=(NAME,))
    (gate,) = judge_all(gates, compare(gates, {}, {}, version(obeyed_before), version(obeyed_after)))
    assert (gate.name, gate.verdict) == ("orders inside documents not obeyed", verdict)
