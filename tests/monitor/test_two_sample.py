"""The tests behind a verdict: against formulas, refits and the libraries that define them, and their rate of false alarms."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy.stats import chi2_contingency, ks_2samp

from dstune.core.errors import UserError
from dstune.monitor import budget as budgets
from dstune.monitor import check, effects
from dstune.monitor.budget import Budget
from dstune.monitor.check import Settings, Sides, permutations_for
from dstune.monitor.conversations import Conversation
from dstune.monitor.power import estimate_power
from dstune.monitor.signals import SignalTable, classifier_effect
from dstune.monitor.streams import find_change
from dstune.monitor.two_sample import (
    CategoryShares,
    DomainClassifier,
    LargestGap,
    MeanDiscrepancy,
    median_distance,
    upper_tail,
)
from dstune.monitor.two_sample import (
    test_jointly as jointly,
)

TURNS = 5


def sides(live: int, reference: int, seed: int = 0, dimensions: int = 6) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    vectors = generator.normal(size=(live + reference, dimensions)).astype(np.float32)
    return vectors, np.arange(live + reference) >= reference


def column(is_live: np.ndarray) -> np.ndarray:
    return is_live.astype(np.float32)[:, None]


def conversations(seed: int, count: int) -> np.ndarray:
    """Turns [count, TURNS, 8] that have a topic of their conversation in common."""
    generator = np.random.default_rng(seed)
    return generator.normal(size=(count, 1, 8)) + 0.3 * generator.normal(size=(count, TURNS, 8))


def test_the_discrepancy_is_that_of_its_definition() -> None:
    vectors, is_live = sides(7, 11)
    bandwidth = median_distance(vectors, 0)
    kernel = np.array([[np.exp(-np.sum((a - b) ** 2) / (2 * bandwidth**2)) for b in vectors] for a in vectors])
    live, reference = np.flatnonzero(is_live), np.flatnonzero(~is_live)
    expected = (
        kernel[np.ix_(live, live)].mean()
        + kernel[np.ix_(reference, reference)].mean()
        - 2 * kernel[np.ix_(live, reference)].mean()
    )
    assert MeanDiscrepancy(vectors)(column(is_live))[0] == pytest.approx(expected, rel=1e-4)


def test_random_features_stand_for_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors, is_live = sides(150, 150)
    vectors[is_live] += 0.5
    exact = MeanDiscrepancy(vectors)(column(is_live))[0]
    monkeypatch.setattr("dstune.monitor.two_sample.EXACT_KERNEL_ROWS", 10)
    assert MeanDiscrepancy(vectors)(column(is_live))[0] == pytest.approx(exact, rel=0.1)


def test_a_score_is_that_of_a_fit_without_the_row() -> None:
    vectors, is_live = sides(9, 12)
    scores = DomainClassifier(vectors).scores(column(is_live))[:, 0]
    centred = vectors - vectors.mean(axis=0)
    penalty = np.trace(centred.T @ centred) / vectors.shape[1]
    for row in range(len(vectors)):
        others = np.arange(len(vectors)) != row
        rows = np.column_stack([np.ones(others.sum()), centred[others]])
        ridge = np.diag([0.0] + [penalty] * vectors.shape[1])
        weights = np.linalg.solve(rows.T @ rows + ridge, rows.T @ is_live[others])
        assert scores[row] == pytest.approx(np.append(1, centred[row]) @ weights, abs=1e-4)


def test_numbers_and_categories_are_compared_as_scipy_does() -> None:
    generator = np.random.default_rng(0)
    is_live = np.arange(50) >= 30
    values = np.round(generator.normal(size=50), 1)  # with ties
    assert LargestGap(values)(column(is_live))[0] == pytest.approx(
        ks_2samp(values[is_live], values[~is_live]).statistic
    )
    names = generator.choice(["a", "b", "c"], 50)
    table = [[np.sum(names[side] == name) for name in "abc"] for side in (is_live, ~is_live)]
    # Of the two sides' terms, the live one's is the share reference / all.
    assert CategoryShares(names)(column(is_live))[0] == pytest.approx(
        chi2_contingency(table).statistic * 30 / 50, rel=1e-5
    )


def test_equal_statistics_share_their_p() -> None:
    assert upper_tail(np.array([2.0, 1.0, 2.0, 0.0])).tolist() == [0.5, 0.75, 0.5, 1.0]
    assert upper_tail(np.array([2.0, 2.0 - 1e-9]))[1] == 1.0  # rounding is no difference


def test_false_alarms_without_drift() -> None:
    """A small version of `benchmarks/drift.py null`: 400 trials at 5% lie in 2.5% to 8.5% with a chance of 99.5%."""
    is_live = np.arange(60) >= 30
    alarms = {"embeddings": 0, "classifier": 0, "joint": 0, "turns": 0}
    for trial in range(400):
        turns = conversations(trial, 60)
        vectors = turns.mean(axis=1).astype(np.float32)
        signals = {"embeddings": MeanDiscrepancy(vectors), "classifier": DomainClassifier(vectors)}
        tested = jointly(signals, is_live, 99, trial)
        for name in signals:
            alarms[name] += tested.p[name] <= 0.05
        alarms["joint"] += min(tested.adjusted.values()) <= 0.05
        if trial < 40:
            flat = turns.reshape(-1, 8).astype(np.float32)
            wrong = jointly({"turns": MeanDiscrepancy(flat)}, np.repeat(is_live, TURNS), 99, trial)
            alarms["turns"] += wrong.p["turns"] <= 0.05
    assert all(10 <= alarms[name] <= 34 for name in ("embeddings", "classifier", "joint")), alarms
    assert alarms["turns"] >= 36  # turns of one conversation are not independent


def test_the_threshold_keeps_the_level_and_reaches_it() -> None:
    vectors, is_live = sides(43, 40)  # of equal sizes the statistics have few values
    tested = jointly(
        {"a": LargestGap(vectors[:, 0]), "b": LargestGap(vectors[:, 1]), "c": LargestGap(vectors[:, 2])},
        is_live,
        999,
        0,
    )
    threshold = tested.threshold(0.05)
    assert 0.04 < np.mean(tested.smallest <= threshold) <= 0.05
    assert 0.01 < threshold < 0.025  # about a third of the level


def test_a_difference_is_found_and_where_there_is_none_it_is_not() -> None:
    vectors, is_live = sides(100, 100)
    vectors[np.flatnonzero(is_live)[:40]] += 1.5
    tested = jointly(
        {"embeddings": MeanDiscrepancy(vectors), "quiet": LargestGap(np.random.default_rng(5).normal(size=200))},
        is_live, 199, 0,
    )  # fmt: skip
    assert tested.adjusted["embeddings"] <= 0.01
    assert tested.adjusted["quiet"] > 0.05
    effect = classifier_effect(vectors, is_live)
    assert effect.low > 0.55


def test_power_grows_with_rows_and_names_those_it_takes() -> None:
    generator = np.random.default_rng(0)
    centres = 2 * generator.normal(size=(8, 16))
    vectors = (centres[generator.integers(8, size=400)] + generator.normal(size=(400, 16))).astype(np.float32)
    is_live = np.arange(400) >= 200
    discrepancy = MeanDiscrepancy(vectors)
    permuted = jointly({"embeddings": discrepancy}, is_live, 499, 0).statistics["embeddings"][1:]
    found = estimate_power(discrepancy, permuted, is_live, 0.01, 0.2)
    assert found is not None and found.live_rows == found.reference_rows == 200
    fewer = estimate_power(discrepancy, permuted, is_live, 0.01, 0.05)
    assert fewer is not None and fewer.power < 0.5 < found.power
    assert fewer.rows_needed > 200 and 200 < found.rows_needed < 250 and found.power < 0.8
    assert estimate_power(discrepancy, permuted, np.arange(400) >= 30, 0.01, 0.2) is None


@pytest.mark.parametrize(("checks", "families"), [(1, 1), (12, 3), (366, 3), (366, 6)])
def test_however_many_checks_share_the_budget_each_can_alarm(checks: int, families: int) -> None:
    """Also where the smallest p-value of every statistic is that of another permutation."""
    level = Budget(0.05, checks).for_family(families, with_streams=True)
    permutations = permutations_for(level, 5)
    assert 5 / (permutations + 1) <= level
    assert permutations_for(level, 1) >= 999


def test_a_test_that_cannot_alarm_has_no_power() -> None:
    generator = np.random.default_rng(0)
    vectors = generator.normal(size=(120, 4)).astype(np.float32)
    table = SignalTable()
    # 3e-8 of one check: no number of permutations that anybody would wait for is enough
    settings = Settings(1e-5, 366, streams=False)
    rows = [Conversation(str(number), (f"t {number}",)) for number in range(60)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(check, "MOST_PERMUTATIONS", 199)
        result = check.run_check(Sides(rows, rows, vectors), table, Budget(settings.alpha, settings.checks), settings)
    assert result.power is not None and (result.power.power, result.power.can_alarm) == (0.0, False)
    assert result.verdict == check.UNDECIDED and "--checks" in result.reason


def test_one_budget_for_all_checks_and_signals() -> None:
    budget = Budget(0.05, 12)
    alone = budget.for_family(2, with_streams=True)
    assert 2 * alone + 3 * budget.for_stream(3) == pytest.approx(0.05 / 12)
    assert budget.corrected(alone, 2, with_streams=True) == pytest.approx(0.05)
    assert budget.corrected(0.5, 2, with_streams=False) == 1.0
    assert 2 * budget.for_family(2, with_streams=False) == pytest.approx(budget.level)


def test_the_record_of_checks_survives_a_line_that_was_cut(tmp_path: Path) -> None:
    budgets.note_check(tmp_path, {"number": 1, "rows": "a"})
    with (tmp_path / budgets.CHECKS).open("a") as stream:
        stream.write('{"number": 2, "ro')
    assert budgets.read_checks(tmp_path) == [{"number": 1, "rows": "a"}]
    assert budgets.earlier_check([{"number": 1, "rows": "a"}], "a") == 1
    assert budgets.earlier_check([{"rows": "b"}], "b") is None


def test_effects_have_intervals_that_hold_the_truth() -> None:
    generator = np.random.default_rng(0)
    hits = 0
    for _ in range(200):
        found = effects.auc(generator.normal(0.5, 1, 80), generator.normal(0, 1, 60))
        hits += found.low <= 0.63816 <= found.high  # P(X > Y) = normal.cdf(0.5 / sqrt(2))
    assert 180 <= hits <= 199
    changed = effects.share_change(0.56, 100, 0.48, 100)  # by the score intervals of Wilson
    assert (changed.low, changed.high) == (pytest.approx(-0.0575, abs=2e-3), pytest.approx(0.2134, abs=2e-3))
    live, reference = np.array(["a"] * 9 + ["b"]), np.array(["a"] * 5 + ["b"] * 3 + ["c"] * 2)
    largest = effects.largest_share_change(live, reference)
    assert largest.value == pytest.approx(0.4)
    assert largest.detail == "a: 50.0% -> 90.0%"


def test_psi_is_refused_where_it_depends_on_the_number_of_rows() -> None:
    generator = np.random.default_rng(0)
    live, reference = generator.normal(size=499), generator.normal(size=600)
    assert effects.psi(live, reference) is None
    same = effects.psi(generator.normal(size=500), reference)
    other = effects.psi(generator.normal(1, 1, size=500), reference)
    assert same is not None and other is not None
    assert same < 0.1 < 0.5 < other


def test_a_change_within_the_window_is_placed_and_none_is_made_up() -> None:
    generator = np.random.default_rng(0)
    reference = generator.normal(size=500)
    times = np.arange(600.0)
    values = generator.normal(size=600) + 1.0 * (np.arange(600) >= 400)
    change = find_change("loss", values, times, reference, 0.001)
    assert change is not None and change.time == change.index
    assert abs(change.index - 400) < 60
    assert change.after > change.before + 0.5
    assert find_change("loss", generator.normal(size=600), times, reference, 0.001) is None
    assert find_change("loss", values[:50], times, reference, 0.001) is None  # too short to say anything


def test_signals_of_the_same_rows_share_their_permutations_and_missing_ones_are_told() -> None:
    table = SignalTable()
    numbers = np.arange(40.0)
    gaps = np.where(np.arange(40) < 10, np.nan, numbers)
    table.add("a", "x", numbers, numbers)
    table.add("b", "x", numbers, numbers + 1)
    table.add("c", "x", numbers, gaps)
    table.add("d", "y", numbers, numbers)
    table.add("few", "x", numbers, np.where(np.arange(40) < 30, np.nan, numbers))
    table.add("constant", "x", np.ones(40), np.ones(40))
    assert sorted([signal.name for signal in family] for family in table.families()) == [["a", "b"], ["c"], ["d"]]
    assert table.unmeasured.keys() == {"few", "constant"}
    assert next(signal for signal in table.signals if signal.name == "c").first_live == 40


def test_streams_need_their_package(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    from dstune.monitor.streams import require_river

    monkeypatch.setitem(sys.modules, "river.drift", None)
    with pytest.raises(UserError, match=r"\.\[monitor\]"):
        require_river()
