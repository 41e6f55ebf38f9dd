"""Built-in rewards, and the process that runs rewards."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from dstune.core import plugins
from dstune.core.errors import UserError
from dstune.protocols import REWARDS
from dstune.rewards.answers import boxed, last_number
from dstune.tasks.reinforcement.reward_process import RewardProcess


def score(name: str, completions: list[str], **columns) -> list[float | None]:
    ids = [list(range(len(text.split()))) for text in completions]
    return list(REWARDS[name]()([""] * len(completions), completions, ids, **columns))


def test_answers():
    assert score("exact_answer", [" Paris\n", "paris is"], answer=["paris", "Paris"]) == [1.0, 0.0]
    assert score("number", ["it is 1,000.0", "3 or 4", "none"], answer=[1000, "3", "7"]) == [1.0, 0.0, 0.0]
    assert score("number", ["5"], answer=[None]) == [None]
    texts = [r"so \boxed{42}", r"\boxed{\frac{1}{2}}", r"\boxed{42", "42"]
    assert score("boxed_answer", texts, answer=["42.0", r"\frac{1}{2}", "42", "42"]) == [1.0, 1.0, 0.0, 0.0]
    assert boxed(r"\boxed{1} and \boxed{a{b}c}") == "a{b}c"
    assert [last_number(text) for text in ("-3.5e2", "1,234,567", "v.2", "no")] == [-350.0, 1234567.0, 0.2, None]


def test_forms():
    texts = ["<think>a</think> b", "<think></think> b", "a</think> b", "<think>a</think>", "b"]
    assert score("reasoning_format", texts) == [1.0, 0.0, 1.0, 0.0, 0.0]
    assert score("pattern", ["abc", "xyz"], pattern=["b", "^b"]) == [1.0, 0.0]
    assert score("json_object", ['{"a": 1}', "[1]", "{", '{"b": 1}'], keys=[["a"], None, None, ["a"]]) == [1.0, 0, 0, 0]
    assert score("brevity", ["", "a b", "a b c d e"], max_length=[4, 4, 4]) == [1.0, 0.5, 0.0]


HOSTILE = """
import os, subprocess, sys, time
import dstune

@dstune.reward
class Hangs(dstune.Reward):
    name = "hangs"
    def __call__(self, prompts, completions, completion_ids, **columns):
        subprocess.Popen(["sleep", "1000"])
        time.sleep(1000)

@dstune.reward
class Crashes(dstune.Reward):
    name = "crashes"
    def __call__(self, prompts, completions, completion_ids, **columns):
        print("last words", file=sys.stderr, flush=True)
        os._exit(3)

@dstune.reward
class Prints(dstune.Reward):
    name = "prints"
    def __call__(self, prompts, completions, completion_ids, **columns):
        for _ in range(1000):
            os.write(1, b"x" * 2**20)
        return [1.0] * len(completions)

@dstune.reward
class Eats(dstune.Reward):
    name = "eats"
    def __call__(self, prompts, completions, completion_ids, **columns):
        return [float(len(bytearray(2**34)))] * len(completions)

@dstune.reward
class Counts(dstune.Reward):
    name = "counts"
    def __call__(self, prompts, completions, completion_ids, **columns):
        return [1.0]

@dstune.reward
class Knows(dstune.Reward):
    name = "knows"
    def __call__(self, prompts, completions, completion_ids, **columns):
        return [float("A_TOKEN_OF_MINE" in os.environ), float("PLAIN_OF_MINE" in os.environ)]
"""


@pytest.fixture
def hostile(tmp_path, monkeypatch):
    file = tmp_path / "hostile.py"
    file.write_text(HOSTILE)
    plugins.activate([str(file)])
    names = ("hangs", "crashes", "prints", "eats", "counts", "knows")
    monkeypatch.setenv("A_TOKEN_OF_MINE", "secret")
    monkeypatch.setenv("PLAIN_OF_MINE", "plain")
    process = RewardProcess([*names, "exact_answer"], seconds=5.0)
    yield lambda name: process(name, ["p", "p"], ["a", "b"], [[1], [2]], {"answer": ["a", "a"]}), process
    process.close()
    plugins.activate([])


def test_what_rewards_do_stays_in_their_process(hostile):
    ask, process = hostile
    for name, said in {
        "hangs": "longer than 5 s",
        "crashes": "last words",
        "prints": "File too large",
        "eats": "MemoryError",
        "counts": "no list with a score for each",
    }.items():
        began = time.monotonic()
        assert ask(name) == [None, None], name
        assert said in process.last_error, (name, process.last_error)
        assert time.monotonic() - began < 60
        assert ask("exact_answer") == [1.0, 0.0], f"another one after {name}"
    assert ask("knows") == [0.0, 1.0], "secrets do not reach rewards"


def test_what_a_reward_started_ends_with_it(hostile):
    ask, process = hostile
    ask("exact_answer")
    session = process._child.pid
    assert ask("hangs") == [None, None]
    states = [
        path.read_text().rpartition(")")[2].split() for path in Path("/proc").glob("[0-9]*/stat") if path.exists()
    ]
    assert not [state for state, _, _, of_session, *_ in states if of_session == str(session) and state != "Z"]


def test_rewards_that_cannot_be_imported_are_refused(tmp_path):
    file = tmp_path / "broken.py"
    file.write_text(
        "import os\nimport dstune\n\n@dstune.reward\nclass Broken(dstune.Reward):\n    name = 'broken'\n"
        "if 'BROKEN_ONCE' in os.environ:\n    raise RuntimeError('no such thing')\n"
    )
    plugins.activate([str(file)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BROKEN_ONCE", "1")
        process = RewardProcess(["broken"], seconds=5.0)
        with pytest.raises(UserError, match="no such thing"):
            process("broken", [""], ["a"], [[1]], {})
        process.close()
    plugins.activate([])
