"""The life of a served model by the commands of a user, and cycles that are killed while they train: nothing is stood in for."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import cycling

pytestmark = pytest.mark.slow


def test_from_a_fine_tune_to_a_rollback(tmp_path: Path) -> None:
    seen = cycling.story(tmp_path, print)
    assert seen["before"]["verdict"] != "drift"
    assert "0 new rows" in seen["without labels"]
    assert seen["after"]["verdict"] == "drift"
    assert set(seen["after"]["words"]) & set(cycling.topics.NOUNS["parcels"].split())
    assert seen["forgotten answers"] == 6 and seen["forgotten rows in training"] == 0
    assert seen["shares"] == {"v1": 0.75, "v3": 0.25}
    asked = seen["answers while it challenges"]
    assert 60 <= asked["v3"] <= 140 and asked["v1"] + asked["v3"] == 400  # 100 and four and a half standard deviations
    assert (seen["answers after promote"], seen["answers after rollback"]) == ({"v3": 40}, {"v1": 40})
    assert seen["decisions"][-3:] == [(2, "register", "challenges"), (2, "promote", "v3"), (2, "rollback", "v1")]


def test_killed_at_ten_moments_it_ends_in_the_same_ledger_and_weights(tmp_path: Path) -> None:
    found = cycling.killed(tmp_path, 10, print)
    assert [kill["same"] for kill in found if "same" in kill] == [True] * 5
    assert len({tuple(kill["behind"]) for kill in found}) >= 3  # not always in the same step
