"""Versions, shares of traffic, the ledger, and the file of a cycle: pure functions and small files."""

# ruff: noqa: RUF001

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from dstune.config.compose import compose
from dstune.core.errors import UserError
from dstune.cycle.collect import Contamination, Row, _limited, digest_of_row
from dstune.cycle.command import _show, _status
from dstune.cycle.decisions import decide_candidate, summarize
from dstune.cycle.gates import (
    Gates,
    Judge,
    agreements,
    all_questions,
    compare,
    judge_all,
    swapped_row,
    undecidable_probes,
)
from dstune.cycle.gateway_routes import Aliases, DeletedRowsGauge, conversation_name
from dstune.cycle.ledger import Ledger
from dstune.cycle.refusals import check_gates, check_task
from dstune.cycle.registry import Registry, chosen_version
from dstune.cycle.schedule import write_schedule
from dstune.cycle.settings import AutoPromote, CycleSettings, read_settings
from dstune.grading.verdicts import LOG_PROBABILITIES, Comparison, decide, rows_needed
from dstune.protocols import PROBES
from dstune.protocols.probe import Probe, Question


def registry(folder: Path) -> Registry:
    found = Registry.read(folder)
    found.versions = {
        "v1": {"status": "current", "parent": None, "cycle": 0, "run": "r"},
        "v2": {"status": "challenger", "parent": "v1", "cycle": 1, "run": "r"},
    }
    found.share("live", 0.1)
    found.write()
    return found


def test_a_person_promotes_and_rolls_back(tmp_path: Path) -> None:
    first = registry(tmp_path)
    assert first.aliases == {"live": {"v1": 0.9, "v2": 0.1}}
    assert first.promote("live") == "v2"
    first.write()
    again = Registry.read(tmp_path)
    assert (again.current, again.challenger, again.aliases) == ("v2", None, {"live": {"v2": 1.0}})
    assert again.roll_back("live") == ("v2", "v1")
    assert (again.current, again.versions["v2"]["status"]) == ("v1", "refused")
    with pytest.raises(UserError, match="no earlier version"):
        again.roll_back("live")
    with pytest.raises(UserError, match="no challenger"):
        again.promote("live")


def test_a_held_challenger_gets_traffic_from_a_person_alone(tmp_path: Path) -> None:
    held = registry(tmp_path)
    held.share("live", 0.0)
    assert held.aliases == {"live": {"v1": 1.0}}
    assert held.challenge("live", 0.1) == "v2"
    assert held.aliases == {"live": {"v1": 0.9, "v2": 0.1}}
    held.promote("live")
    with pytest.raises(UserError, match="no challenger"):
        held.challenge("live", 0.1)


def test_rolling_back_a_challenger_leaves_the_current_version(tmp_path: Path) -> None:
    found = registry(tmp_path)
    assert found.roll_back("live") == ("v2", "v1")
    assert (found.current, found.challenger, found.aliases) == ("v1", None, {"live": {"v1": 1.0}})


def test_traffic_is_shared_by_weight_and_a_conversation_stays_where_it_is() -> None:
    served = {"v1": object(), "v2": object()}
    shares = {"v1": 0.9, "v2": 0.1}
    counts = Counter(chosen_version(shares, served, f"user {number}") for number in range(4000))
    assert 320 <= counts["v2"] <= 480  # 400 and five standard deviations
    assert chosen_version(shares, {"v1": object()}, "anybody") == "v1"  # what is not served leaves its share
    assert chosen_version(shares, {}, "anybody") is None
    first = {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}]}
    later = {"messages": [*first["messages"], {"role": "assistant", "content": "x"}, {"role": "user", "content": "b"}]}
    assert (
        conversation_name(first) == conversation_name(later) != conversation_name({"messages": later["messages"][1:2]})
    )
    assert conversation_name({"user": "u", "input": "a"}) == conversation_name({"user": "u", "input": "b"}) == "u"


def test_a_server_follows_the_registry(tmp_path: Path) -> None:
    found, aliases = registry(tmp_path), Aliases(tmp_path)
    served = {"v1": object(), "v2": object()}
    assert aliases.version("live", {"user": "u"}, served) in served
    assert aliases.version("v1", {"user": "u"}, served) is None
    found.promote("live")
    found.write()
    assert {aliases.version("live", {"user": str(number)}, served) for number in range(50)} == {"v2"}


def test_a_line_of_the_ledger_is_written_once_and_a_cut_one_again(tmp_path: Path) -> None:
    Ledger(tmp_path).note(1, "collect", "trains", "because")
    with (tmp_path / "ledger.jsonl").open("a") as stream:
        stream.write('{"cycle": 1, "st')
    again = Ledger(tmp_path)
    again.note(1, "collect", "trains", "because")
    again.note(1, "train", "trained", "é")
    lines = [json.loads(line) for line in (tmp_path / "ledger.jsonl").read_text().splitlines()]
    assert [(line["step"], line["decision"]) for line in lines] == [("collect", "trains"), ("train", "trained")]


def row(number: int, key: str) -> Row:
    content = {"text": f"text {number}", "label": "a"}
    return Row(str(number), digest_of_row(content), key, "label", content, is_held_out=False)


@pytest.mark.parametrize(
    ("counts", "share", "left"),
    [
        ({"a": 100, "b": 10, "c": 10}, 0.4, {"a": 13, "b": 10, "c": 10}),
        ({"a": 100, "b": 5}, 0.2, {"a": 5, "b": 5}),  # of two keys each may have a half
        ({"a": 7}, 0.2, {"a": 7}),
        ({}, 0.2, {}),
    ],
)
def test_nobody_teaches_the_model_alone(counts: dict[str, int], share: float, left: dict[str, int]) -> None:
    rows = [
        row(1000 * number + index, key) for number, (key, count) in enumerate(counts.items()) for index in range(count)
    ]
    assert Counter(one.key for one in _limited(rows, share)) == left


def test_rows_that_are_measured_are_not_trained_on() -> None:
    long = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen"
    measured = Contamination([{"text": "The Plot, thin."}, {"text": long}])
    texts = ["the plot thin", f"well {long[:-9]}", "the plot is thin", "one two three"]
    assert measured.touched([{"text": text} for text in texts]) == [True, True, False, False]
    template = "Say in one word whether this review of a film is fresh or rotten, please:"
    measured = Contamination([{"text": f"{template} review {number}"} for number in range(5)])
    # What all measured rows share is no question.
    assert measured.touched([{"text": f"{template} {rest}"} for rest in ("review 3", "another")]) == [True, False]


def changed(rows: int, gained: int, lost: int) -> tuple[np.ndarray, np.ndarray]:
    """Hits of two versions that differ in so many rows."""
    current, candidate = np.ones(rows), np.ones(rows)
    current[:gained], candidate[rows - lost :] = 0, 0
    return current, candidate


@pytest.mark.parametrize(
    ("rows", "gained", "lost", "verdict"),
    [
        (1500, 30, 30, "passed"),
        (1500, 30, 45, "undecided"),  # a point worse: two are allowed, and the interval reaches beyond them
        (1500, 10, 90, "worse"),
        (200, 4, 4, "undecided"),  # as good, and too few rows to show it
        (20, 0, 0, "undecided"),  # not a single difference shows nothing in 20 rows
        (20, 0, 10, "worse"),
        (200, 40, 10, "passed"),
    ],
)
def test_a_gate_passes_is_worse_or_undecided(rows: int, gained: int, lost: int, verdict: str) -> None:
    (gate,) = decide([Comparison("set", *changed(rows, gained, lost), 0.02)], 0.025, 1)
    assert gate.verdict == verdict
    assert gate.gain == pytest.approx((gained - lost) / rows) and gate.low < gate.gain < gate.high
    assert (gate.rows_needed is not None) == (verdict == "undecided")


@pytest.mark.parametrize(("rows", "gained", "lost"), [(100, 7, 14), (40, 0, 3), (25, 5, 0), (60, 0, 0)])
def test_bounds_are_those_of_the_score_interval(rows: int, gained: int, lost: int) -> None:
    """Tango (1998): the bound is the difference whose score statistic, at the most likely shares, is the normal quantile."""
    (gate,) = decide([Comparison("set", *changed(rows, gained, lost), 0.02)], 0.025, 1)
    for bound, quantile in ((gate.low, 1.959964), (gate.high, -1.959964)):
        share_lost = np.linspace(max(0.0, -bound), (1 - bound) / 2, 200_001)[1:-1]
        same = 1 - 2 * share_lost - bound
        likelihood = (rows - gained - lost) * np.log(same)
        likelihood += gained * np.log(share_lost + bound) + lost * np.log(share_lost)
        best = share_lost[likelihood.argmax()]
        statistic = (gained - lost - rows * bound) / np.sqrt(rows * (2 * best + bound - bound**2))
        assert statistic == pytest.approx(quantile, abs=0.01)


def test_more_gates_refuse_no_more_of_the_good_candidates() -> None:
    """Each loses as much as is allowed, in every gate: the worst that may not be refused more often than the budget says."""
    generator = np.random.default_rng(0)
    refused = {}
    for gates in (1, 25):
        worse = 0
        for _ in range(100):
            scores = [changed(400, *map(int, generator.binomial(400, (0.02, 0.06)))) for _ in range(gates)]
            results = decide([Comparison("set", *pair, 0.04) for pair in scores], 0.05, gates)
            worse += any(result.verdict == "worse" for result in results)
        refused[gates] = worse / 100
    assert refused[1] <= 0.1 and refused[25] <= 0.1  # 0.05, and more than two standard errors


def test_the_rows_that_a_gate_asks_for_are_enough() -> None:
    generator = np.random.default_rng(1)
    few = changed(100, 3, 3)
    needed = rows_needed(few[1] - few[0], 0.02, "points", 0.025)
    assert needed is not None and 1000 < needed < 2000
    passed = [
        decide([Comparison("set", *changed(needed, *generator.binomial(needed, (0.03, 0.03))), 0.02)], 0.025, 1)
        for _ in range(100)
    ]
    assert 68 <= sum(gate.verdict == "passed" for (gate,) in passed) <= 97  # 80 and more, by a row that is added
    assert rows_needed(few[1] - few[0], 0.02, "points", 0.025, 4) > needed  # to pass four such gates
    assert rows_needed(few[1] - few[0], 0.0, "points", 0.025) is None


def test_log_probabilities_are_judged_in_their_own_unit() -> None:
    generator = np.random.default_rng(2)
    current = -generator.exponential(1.0, 400)
    for shift, verdict in ((0.0, "passed"), (-0.02, "undecided"), (-0.2, "worse")):
        candidate = current + shift + generator.normal(0, 0.1, 400)
        (gate,) = decide([Comparison("set", current, candidate, 0.02, LOG_PROBABILITIES)], 0.025, 1)
        assert gate.verdict == verdict and "nats a token" in gate.reason


def test_gates_look_at_slices_words_and_prompts() -> None:
    rows = [{"text": f"He is {number}", "label": "a", "language": "en" if number % 2 else "de"} for number in range(60)]

    current = Judge(lambda rows: np.ones(len(rows)), lambda rows: ["a" for _ in rows])
    gates = Gates(slices=("language",), swaps=(("he", "she"),), margin=0.7, bootstrap=200)
    prompts = {"canaries": [{"prompt": "x", "expected": "a"}], "safety": [{"prompt": "y", "pattern": "^[ab]$"}]}
    candidate = Judge(
        lambda rows: np.array([float(row["language"] == "en") for row in rows]),
        lambda rows: ["b" if "She" in row.get("text", "") else "a" for row in rows],
    )
    assert verdicts(gates, {"old": rows}, prompts, current, candidate) == {
        "old": "passed",  # a margin of 0.7 allows for a half
        'old: language="de"': "worse",
        'old: language="en"': "undecided",  # 30 rows without a difference: 5 points are allowed
        "old: exchanged words": "worse",
        "canaries": "passed",
        "safety": "passed",
    }
    broken = Judge(current.scores, lambda rows: ["c" for _ in rows])
    assert verdicts(gates, {}, prompts, current, broken) == {"canaries": "worse", "safety": "worse"}


def test_rows_without_a_score_say_nothing() -> None:
    current = Judge(lambda rows: np.array([np.nan, *np.ones(len(rows) - 1)]), lambda rows: ["a" for _ in rows])
    candidate = Judge(lambda rows: np.zeros(len(rows)), current.answers)
    rows = [{"text": str(number), "topic": "x"} for number in range(21)]
    comparisons = compare(Gates(slices=("topic",)), {"old": rows, "few": rows[:5]}, {}, current, candidate)
    assert [(comparison.name, len(comparison.current)) for comparison in comparisons] == [
        ("old", 20), ('old: topic="x"', 20),
    ]  # fmt: skip


def verdicts(gates: Gates, sets: dict, prompts: dict, current: Judge, candidate: Judge) -> dict[str, str]:
    results = judge_all(gates, compare(gates, sets, prompts, current, candidate))
    return {result.name: result.verdict for result in results}


def test_a_key_that_contradicts_the_others_is_found() -> None:
    generator = np.random.default_rng(0)
    keys = ["good"] * 200 + ["worse"] * 40 + ["wrong"] * 40 + ["few"] * 5
    chance = {"good": 0.95, "worse": 0.8, "wrong": 0.2, "few": 0.0}
    hits = (generator.random(len(keys)) < [chance[key] for key in keys]).astype(float)
    results = judge_all(Gates(key_gap=0.3, bootstrap=500), [], agreements(hits, keys))
    assert {result.name: result.verdict for result in results} == {
        "key good": "passed", "key worse": "passed", "key wrong": "worse",
    }  # fmt: skip
    assert agreements(hits[:200], keys[:200]) == []  # nobody to be compared with


def gate(name: str, verdict: str = "passed", rows: int = 50, low: float = 0.02, **changes: object) -> dict[str, object]:
    entry = {"name": name, "rows": rows, "low": low, "high": 0.1, "verdict": verdict, "reason": "", "rows_needed": 900}
    return {**entry, "is_set": name in ("validation", "new rows"), **changes}


@pytest.mark.parametrize(
    ("gates", "largest_key", "decision"),
    [
        ([gate("new rows")], 0.2, "promoted"),
        ([gate("new rows", rows=49)], 0.2, "challenges"),
        ([gate("new rows", low=0.01)], 0.2, "challenges"),
        ([gate("new rows")], 0.21, "challenges"),  # one key stands behind more of the rows than it may
        ([gate("new rows", "worse")], 0.2, "refused"),
        ([gate("key a")], 0.2, "refused"),  # nothing says that the candidate is as good
        ([gate("validation"), gate("new rows")], 0.2, "promoted"),
        ([gate("validation"), gate("new rows"), gate("a slice", "undecided")], 0.2, "promoted"),
        ([gate("validation"), gate("new rows"), gate("a slice", "undecided", high=-0.01)], 0.2, "challenges"),
        ([gate("validation", "undecided"), gate("new rows")], 0.2, "promoted"),  # too few rows, and another set passes
        ([gate("validation", "undecided", rows=900), gate("new rows")], 0.2, "held"),
        ([gate("validation", "undecided", high=-0.01), gate("new rows")], 0.2, "held"),
        ([gate("validation"), gate("new rows", "undecided", low=0.0)], 0.2, "challenges"),
        ([gate("new rows", "undecided")], 0.2, "held"),  # and nothing else that shows it
        ([gate("validation", "undecided", rows_needed=None)], 0.2, "held"),
        ([gate("a probe"), gate("key a")], 0.2, "challenges"),
        ([gate("validation", "undecided"), gate("a slice", "worse")], 0.2, "refused"),
        ([{"name": "new rows", "rows": 50, "passed": False, "reason": "of an earlier version"}], 0.2, "refused"),
    ],
)
def test_what_becomes_of_a_candidate(
    tmp_path: Path, gates: list[dict[str, object]], largest_key: float, decision: str
) -> None:
    bounds = AutoPromote(least_gain=0.01, least_new_rows=50)
    settings = CycleSettings(tmp_path / "run", tmp_path, "rows.jsonl", auto_promote=bounds)
    assert decide_candidate(settings, gates, largest_key)[0] == decision
    without_bounds = CycleSettings(tmp_path / "run", tmp_path, "rows.jsonl")
    assert decide_candidate(without_bounds, gates, largest_key)[0] == decision.replace("promoted", "challenges")


def test_an_undecided_gate_says_how_many_rows_it_needs() -> None:
    undecided = [gate("a slice", "undecided"), gate("validation", "undecided", rows=900), gate("new rows", "undecided")]
    state, reason = summarize(undecided)
    assert state == "undecided" and reason.startswith(
        "0 of 3 gates passed, undecided: validation (900 rows, enough for"
    )
    assert reason.endswith("new rows (50 rows, 900 needed), a slice (50 rows, 900 needed)")
    assert "allows no loss" in summarize([gate("validation", "undecided", rows_needed=None)])[1]
    assert summarize([gate("validation"), gate("a slice", "undecided")])[0] == "passed"


@pytest.mark.parametrize(
    ("words", "is_refused"),
    [
        (["task=classification", "task.labels=[a,b]"], False),
        (["task=chat"], False),
        (["task=classification", "task.labels=[a,b]", "task.multi_label=true"], True),
        (["task=embedding"], True),
        (["task=preference"], True),
    ],
)
def test_tasks_that_feedback_cannot_teach_are_refused(words: list[str], is_refused: bool) -> None:
    config = compose(["model.path=/nowhere", "data=files", "data.train=rows.jsonl", *words]).config
    if is_refused:
        with pytest.raises(UserError, match="feedback"):
            check_task(config)
    else:
        check_task(config)


def test_rows_that_no_gate_can_judge_are_refused_with_their_place(tmp_path: Path) -> None:
    def check(task: list[str], labels: tuple[str, ...], **rows: list[object]) -> str:
        files = {}
        for name, content in rows.items():
            files[name] = str(tmp_path / f"{name}.jsonl")
            Path(files[name]).write_text("".join(json.dumps(row) + "\n" for row in content))
        gates = Gates(tests=(files.pop("tests"),) if "tests" in files else (), **files)
        settings = CycleSettings(tmp_path, tmp_path, "rows.jsonl", gates=gates)
        config = compose(["model.path=/nowhere", "data=files", "data.train=rows.jsonl", *task]).config
        with pytest.raises(UserError) as refused:
            check_gates(settings, config, labels, {})
        return str(refused.value)

    answered = {"role": "assistant", "content": "a cat"}
    text = [{"role": "user", "content": "what is it?"}, answered]
    part = {"type": "image_url", "image_url": {"url": "data:image/png;base64,"}}
    seen = [{"role": "user", "content": [part, {"type": "text", "text": "what is it?"}]}, answered]
    message = check(
        ["task=chat"], (), tests=[{"messages": text}, {"messages": seen}, {"messages": text, "images": ["x"]}]
    )
    assert "gates.tests" in message and "tests.jsonl:2" in message and "shows an image" in message
    assert "1 rows more" in message
    message = check(["task=chat"], (), safety=[{"prompt": "x"}], canaries=[{"messages": seen, "expected": "a"}])
    assert "gates.safety" in message and "`expected`" in message and "gates.canaries" in message
    labels = ["task=classification", "task.labels=[a,b]"]
    message = check(labels, ("a", "b"), tests=[{"text": "x", "label": "a"}, {"text": "y", "label": "c"}])
    assert "tests.jsonl:2" in message and "'c', which the model lacks" in message
    assert "no row of task=classification" in check(labels, ("a", "b"), tests=[{"review": "x", "stars": 3}])


def test_words_are_exchanged_as_they_are_written() -> None:
    swapped = swapped_row({"text": "He saw her, the hero.", "label": "x"}, (("he", "she"), ("his", "her")))
    assert swapped == {"text": "She saw his, the hero.", "label": "x"}


def config(folder: Path, **changes: object) -> Path:
    (folder / "run").mkdir(exist_ok=True)
    (folder / "run" / "run.yaml").write_text("")
    content = {"run": "run", "folder": "cycle", "data": "rows.jsonl", **changes}
    path = folder / "cycle.yaml"
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
    return path


def test_a_file_is_read_and_all_that_is_wrong_is_listed(tmp_path: Path) -> None:
    settings = read_settings(config(tmp_path, gates={"tests": ["t.jsonl", "sample://x"], "swaps": [["he", "she"]]}))
    assert settings.gates.tests == (str(tmp_path / "t.jsonl"), "sample://x")
    assert settings.gates.swaps == (("he", "she"),)
    assert settings.auto_promote is None
    wrong = config(tmp_path, data=None, replai=1, replay=2, gates={"margin": "x", "swaps": ["he"]}, overrides="a")
    with pytest.raises(UserError) as caught:
        read_settings(wrong)
    assert {problem.where for problem in caught.value.problems} == {
        "replai", "replay", "gates.margin", "gates.swaps", "overrides", "data",
    }  # fmt: skip
    assert "did you mean replay" in str(caught.value)


def test_schedulers_get_files_that_they_take(tmp_path: Path) -> None:
    import subprocess

    import yaml

    path = config(tmp_path)
    settings = read_settings(path)
    line = write_schedule(path, settings, "cron", None).read_text().splitlines()[-1]
    assert line.split(maxsplit=5)[:5] == ["17", "3", "*", "*", "*"] and str(path) in line
    assert line.split(maxsplit=5)[5].startswith(f"cd {Path.cwd()} && ")  # cron starts in another folder
    script = write_schedule(path, settings, "slurm", None)
    assert subprocess.run(["bash", "-n", str(script)]).returncode == 0
    assert all(text.startswith("#SBATCH --") for text in script.read_text().splitlines() if text.startswith("#SBATCH"))
    bundle = yaml.safe_load(write_schedule(path, settings, "databricks", None).read_text())
    (task,) = bundle["resources"]["jobs"]["dstune_cycle"]["tasks"]
    assert task["spark_python_task"] == {"python_file": "./dstune_cycle.py", "parameters": [str(path)]}
    compile((tmp_path / "cycle" / "dstune_cycle.py").read_text(), "dstune_cycle.py", "exec")
    with pytest.raises(UserError, match="exists already"):
        write_schedule(path, settings, "cron", None)


@pytest.mark.parametrize(
    ("questions", "lost", "decision"),
    [
        (25, 7, "held"),
        (36, 0, "held"),  # even if no answer changes, 5 points take 73 questions and more
        (73, 0, "promoted"),
        (160, 2, "promoted"),
        (160, 6, "held"),
        (160, 45, "refused"),
    ],
)
def test_a_probe_that_does_not_decide_holds_a_candidate(
    tmp_path: Path, questions: int, lost: int, decision: str
) -> None:
    settings = CycleSettings(tmp_path / "run", tmp_path, "rows.jsonl", auto_promote=AutoPromote())
    good = [Comparison(name, *changed(1500, 60, 0), 0.02, is_set=True) for name in ("validation", "new rows")]
    probe = Comparison("refusals", *changed(questions, 0, lost), 0.05, has_to_pass=True)
    gates = [vars(result) for result in decide([*good, probe], 0.025, 10)]
    found, reason = decide_candidate(settings, gates, 0.1)
    assert found == decision
    assert ("refusals (36 rows, 85 needed)" in reason) == (questions == 36)


def test_packaged_probes_have_enough_questions_for_the_default_margin() -> None:
    """A candidate that loses three answers and gains three passes."""
    for name, kind in PROBES.classes().items():
        questions = all_questions(kind())
        comparison = Comparison(name, *changed(len(questions), 3, 3), Gates().probe_margin, has_to_pass=True)
        assert decide([comparison], Gates().error, 10)[0].verdict == "passed", name
        assert len({question.id for question in questions}) == len({question.text for question in questions})
        assert len({question.id for question in questions}) == len(questions)


def test_a_probe_with_too_few_questions_is_named_before_the_training() -> None:
    class Prices(Probe):
        name = "prices"
        title = "questions about prices"

        def questions(self) -> list[Question]:
            return [Question("1", "What does it cost?"), Question("2", "Is it cheap?")]

    (told,) = undecidable_probes(Gates(), {"prices": Prices, "refusals": PROBES["refusals"]})
    assert "prices has 2 questions" in told and "5 points" in told
    margin = float(told.rpartition("to ")[2])
    assert margin == 0.66 and undecidable_probes(Gates(probe_margin=margin), {"prices": Prices}) == []
    assert decide([Comparison("prices", *changed(2, 0, 0), margin)], 0.025, 1)[0].verdict == "passed"


def test_a_version_that_was_trained_on_deleted_rows_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = registry(tmp_path)
    found.versions["v1"]["holds_forgotten"] = True
    found.write()
    _show(_status(CycleSettings(tmp_path / "run", tmp_path, "rows.jsonl")), as_json=False)
    assert "v1     current    from r  holds deleted rows" in capsys.readouterr().out
    (family,) = DeletedRowsGauge(Aliases(tmp_path)).collect()
    values = {sample.labels["version"]: sample.value for sample in family.samples}
    assert values == {"v1": 1.0, "v2": 0.0}


def test_measured_rows_are_recognised_in_every_script_and_with_a_word_changed() -> None:
    questions = [
        "Wie kann ich die Rechnung vom letzten Monat noch einmal herunterladen?",
        "我的包裹上周就应该送到，为什么到现在还没有任何消息？",
        "Why was my card charged twice for the same order on Friday?",
    ]
    measured = Contamination([{"text": text} for text in questions])
    changed_rows = [
        "Wie kann ich die Rechnung vom letzten Jahr noch einmal herunterladen",
        "我的包裹上周就该送到 为什么到现在还没有任何消息",
        "Why was my card charged twice for the same purchase on Friday?",
    ]
    others = ["Wie ändere ich meine Adresse?", "怎样修改我的收货地址？", "Why was my card refused on Friday?"]
    assert measured.touched([{"text": text} for text in [*changed_rows, *others]]) == [True] * 3 + [False] * 3


@pytest.mark.parametrize(
    ("gates", "before", "after"),
    [
        ([gate("validation"), gate("new rows", low=0.0)], "challenges", "promoted"),  # needs to show no gain
        ([gate("validation", "undecided")], "held", "challenges"),  # too few rows to show that it is as good
        ([gate("validation"), gate("a probe", "undecided", holds=True)], "held", "challenges"),
        ([gate("validation"), gate("a probe", "undecided", holds=True, loses=True)], "held", "held"),
        ([gate("validation", "undecided", high=-0.01), gate("new rows")], "held", "held"),
        ([gate("validation", "worse")], "refused", "refused"),
        ([gate("key a")], "refused", "refused"),
    ],
)
def test_a_candidate_without_deleted_rows_goes_before_a_current_version_with_them(
    tmp_path: Path, gates: list[dict[str, object]], before: str, after: str
) -> None:
    bounds = AutoPromote(least_gain=0.01, least_new_rows=50)
    settings = CycleSettings(tmp_path / "run", tmp_path, "rows.jsonl", auto_promote=bounds)
    assert decide_candidate(settings, gates, 0.2)[0] == before
    found, reason = decide_candidate(settings, gates, 0.2, replaces="v2")
    assert found == after
    assert ("v2 holds deleted rows" in reason) == (after != "refused")
    if after == "promoted":  # one key alone supplied most rows: a person decides, as ever
        assert decide_candidate(settings, gates, 0.21, replaces="v2")[0] == "challenges"
        by_hand = CycleSettings(tmp_path / "run", tmp_path, "rows.jsonl")
        assert decide_candidate(by_hand, gates, 0.2, replaces="v2")[0] == "challenges"


def test_traffic_moves_only_to_versions_without_deleted_rows(tmp_path: Path) -> None:
    found = registry(tmp_path)
    found.versions["v2"]["holds_forgotten"] = True
    for action in (lambda: found.promote("live"), lambda: found.challenge("live", 0.1)):
        with pytest.raises(UserError, match="v2 was trained on rows that were deleted since"):
            action()
    del found.versions["v2"]["holds_forgotten"]
    found.promote("live")
    found.versions["v3"] = {"status": "challenger", "parent": "v1", "cycle": 2, "run": "r"}
    found.promote("live")
    found.versions["v2"]["holds_forgotten"] = True
    assert found.roll_back("live") == ("v3", "v1") and found.aliases == {"live": {"v1": 1.0}}
