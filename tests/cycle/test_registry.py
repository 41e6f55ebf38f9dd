"""Versions, shares of traffic, the ledger, and the file of a cycle: pure functions and small files."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from dstune.config.compose import compose
from dstune.core.errors import UserError
from dstune.cycle.collect import Contamination, Row, _limited, digest_of_row
from dstune.cycle.gates import Gates, Judge, compare, compare_keys, judge, swapped_row
from dstune.cycle.gateway_routes import Aliases, conversation_name
from dstune.cycle.ledger import Ledger
from dstune.cycle.registry import Registry, chosen_version
from dstune.cycle.schedule import write_schedule
from dstune.cycle.settings import AutoPromote, CycleSettings, read_settings
from dstune.cycle.steps import Cycle, check_task


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
    assert measured.touches({"text": "the plot thin"})
    assert measured.touches({"text": f"well {long[:-9]}"})
    assert not measured.touches({"text": "the plot is thin"})
    assert not measured.touches({"text": "one two three"})
    template = "Say in one word whether this review of a film is fresh or rotten, please:"
    measured = Contamination([{"text": f"{template} review {number}"} for number in range(5)])
    assert measured.touches({"text": f"{template} review 3"})
    assert not measured.touches({"text": f"{template} another"})  # what all measured rows share is no question


def test_a_candidate_passes_unless_it_may_be_worse() -> None:
    generator = np.random.default_rng(0)
    current = (generator.random(400) < 0.8).astype(float)
    assert compare("same", (current, current), 0.02, 500).passed
    worse = current * (generator.random(400) < 0.9)
    found = compare("worse", (current, worse), 0.02, 500)
    assert not found.passed and found.low < found.gain < found.high < 0
    better = np.maximum(current, (generator.random(400) < 0.3).astype(float))
    assert compare("better", (current, better), 0.0, 500).low > 0


def test_gates_look_at_slices_words_and_prompts() -> None:
    rows = [{"text": f"He is {number}", "label": "a", "language": "en" if number % 2 else "de"} for number in range(60)]

    current = Judge(lambda rows: np.ones(len(rows)), lambda rows: ["a" for _ in rows])
    gates = Gates(slices=("language",), swaps=(("he", "she"),), margin=0.7, bootstrap=200)
    prompts = {"canaries": [{"prompt": "x", "expected": "a"}], "safety": [{"prompt": "y", "pattern": "^[ab]$"}]}
    candidate = Judge(
        lambda rows: np.array([float(row["language"] == "en") for row in rows]),
        lambda rows: ["b" if "She" in row.get("text", "") else "a" for row in rows],
    )
    results = {result.name: result for result in judge(gates, {"old": rows}, prompts, current, candidate)}
    assert results["old"].passed  # a margin of 0.7 allows for a half
    assert not results['old: language="de"'].passed and results['old: language="en"'].passed
    assert not results["old: exchanged words"].passed
    assert results["canaries"].passed and results["safety"].passed
    broken = Judge(current.scores, lambda rows: ["c" for _ in rows])
    results = {result.name: result for result in judge(gates, {}, prompts, current, broken)}
    assert not results["canaries"].passed and not results["safety"].passed


def test_a_key_that_contradicts_the_others_is_found() -> None:
    generator = np.random.default_rng(0)
    keys = ["good"] * 200 + ["worse"] * 40 + ["wrong"] * 40 + ["few"] * 5
    chance = {"good": 0.95, "worse": 0.8, "wrong": 0.2, "few": 0.0}
    hits = (generator.random(len(keys)) < [chance[key] for key in keys]).astype(float)
    results = {result.name: result for result in compare_keys(hits, keys, 0.3, 500)}
    assert {name: result.passed for name, result in results.items()} == {
        "key good": True, "key worse": True, "key wrong": False,
    }  # fmt: skip
    assert compare_keys(hits[:200], keys[:200], 0.3, 500) == []  # nobody to be compared with


@pytest.mark.parametrize(
    ("changes", "largest_key", "decision"),
    [
        ({}, 0.2, "promoted"),
        ({"rows": 49}, 0.2, "challenges"),
        ({"low": 0.01}, 0.2, "challenges"),
        ({}, 0.21, "challenges"),  # one key stands behind more of the rows than it may
        ({"passed": False}, 0.2, "refused"),
        ({"name": "key a"}, 0.2, "refused"),  # nothing says that the candidate is as good
    ],
)
def test_nobody_is_asked_within_the_bounds_alone(
    tmp_path: Path, changes: dict[str, object], largest_key: float, decision: str
) -> None:
    bounds = AutoPromote(least_gain=0.01, least_new_rows=50)
    cycle = Cycle(CycleSettings(tmp_path / "run", tmp_path, "rows.jsonl", auto_promote=bounds))
    cycle.place.mkdir(parents=True)
    (cycle.place / "collect.json").write_text(json.dumps({"largest_key": largest_key}))
    gate = {"name": "new rows", "rows": 50, "low": 0.02, "passed": True, "reason": "because"} | changes
    assert cycle._decision([gate])[0] == decision


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
