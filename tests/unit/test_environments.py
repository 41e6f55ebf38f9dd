"""Completions of several turns: tokens are kept, those of tools are read and not trained, and limits end them."""

from __future__ import annotations

import json
import threading
from types import SimpleNamespace

import pytest
import torch
from support.tool_template import TEMPLATE, call_of

from dstune.core import plugins
from dstune.core.errors import UserError
from dstune.data.chat.tool_calls import FORMS
from dstune.data.collate import NO_TARGET
from dstune.tasks.reinforcement import turns
from dstune.tasks.reinforcement.config import ReinforcementConfig
from dstune.tasks.reinforcement.environment_host import in_threads
from dstune.tasks.reinforcement.outages import Failure, Patience
from dstune.tasks.reinforcement.reward_process import RewardProcess
from dstune.tasks.reinforcement.rollout import Rollouts
from dstune.testing.tiny import word_tokenizer

CALL, WRONG, HANG, HALF = CALLS = [*map(call_of, ("peek", "none", "hang", "half"))]
LEAVE, WAIT = call_of("leave"), call_of("wait")
ENVIRONMENTS = '''
import threading
import time
import dstune
import numpy

everyone = threading.Barrier(14)

@dstune.environment
class Hidden(dstune.Environment):
    name = "hidden"

    def reset(self, word=None, fails=None, **row):
        if fails:
            raise KeyError(fails)
        self.word, self.peeked = word or self.random.choice(["w1", "w2"]), False
        return " now"

    def peek(self) -> str:
        """Look at the word."""
        self.peeked = True
        return self.word

    def hang(self) -> str:
        """Never answer."""
        time.sleep(1000)

    def wait(self) -> str:
        """Answer once 14 completions wait."""
        everyone.wait(timeout=60)
        return "w2"

    def half(self) -> str:
        """Return half of a character."""
        return "w1 " + chr(0xD83D)

    def leave(self) -> str:
        """End the program."""
        raise SystemExit(3)

    def get_reward(self):
        if self.word == "w3":
            raise ValueError("no such word")
        return numpy.float32(self.peeked)

@dstune.environment
class TrlStyle:
    def reset(self, **kwargs):
        self.count = 0

    async def add(self, amount: int) -> int:
        """
        Add to the counter.

        Args:
            amount: How much.
        """
        self.count += amount
        return self.count

@dstune.reward
def counted(prompts, completions, environments, **kwargs):
    return [float(environment.count) for environment in environments]

@dstune.environment
class Undescribed(dstune.Environment):
    name = "undescribed"
    def tool(self, x): return x
'''


class Script:
    """Writes given tokens in the place of a model."""

    def __init__(self, tokenizer, answers: dict[tuple[int, int], list[str]]):
        self.tokenizer, self.answers, self.seen = tokenizer, answers, []

    def __call__(self, module, given, *, ends, **settings):
        ended = []
        for turn in given:
            self.seen.append(list(turn.tokens))
            place = turn.completion.prompt, turn.completion.sample
            text = self.answers[place].pop(0)
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"][: turn.room]
            turn.completion.ids += ids
            turn.completion.logps += [-1.0] * len(ids)
            ended.append(ids[-1] in ends)
        return ended


@pytest.fixture
def act(tmp_path, monkeypatch):
    file = tmp_path / "environments.py"
    file.write_text(ENVIRONMENTS)
    plugins.activate([str(file)])
    tokenizer = word_tokenizer([*("<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"), *["user", "assistant", "tool", "tools"],
                                *["go", "now", "w1", "w2", "peek", "hang", "half", "leave", "wait", "error:", "ok"],
                                *CALLS, LEAVE, WAIT])  # fmt: skip
    tokenizer.chat_template = TEMPLATE
    world = SimpleNamespace(any=bool, gather=lambda value: [value], rank=0, size=1)
    opened = []

    def run(answers, *, rows, **settings):
        task = ReinforcementConfig(environment="hidden", template_date="2026-01-01", **settings)
        scorer = SimpleNamespace(
            process=RewardProcess(task), patience=Patience(0.0), columns_of=lambda prompt: rows[prompt]
        )
        opened.append(scorer.process)
        end = tokenizer.convert_tokens_to_ids("<|im_end|>")
        environments = turns.Environments(task, tokenizer, scorer, 64, {end})
        script = Script(tokenizer, answers)
        monkeypatch.setattr(turns, "continue_completions", script)
        module = torch.nn.Linear(1, 1)
        found = environments.complete(module, sorted(rows), 1, (0, 1), world, in_step=False)
        return found, script, scorer.process, tokenizer

    yield run
    for process in opened:
        process.close()
    plugins.activate([])


def test_tokens_of_tools_are_read_and_not_trained(act):
    rows = {0: {"prompt": "go", "word": "w2"}, 1: {"prompt": [{"role": "user", "content": "go"}], "word": "w1"}}
    answers = {(0, 0): [f"ok {CALL} <|im_end|>", "w2 <|im_end|>"], (1, 0): ["w1 w1 <|im_end|>"]}
    (first, second), script, process, tokenizer = act(answers, rows=rows)
    prompt = "<|im_start|> tools half hang leave peek wait <|im_end|> <|im_start|> user go now <|im_end|> <|im_start|> assistant"
    assert tokenizer.decode(first.completion.prompt_ids) == prompt
    written = f"ok {CALL} <|im_end|> <|im_start|> tool w2 <|im_end|> <|im_start|> assistant w2 <|im_end|>"
    assert tokenizer.decode(first.completion.ids) == written
    read = [tokenizer.decode([first.completion.ids[place]]) for place in first.completion.read]
    assert " ".join(read) == "<|im_start|> tool w2 <|im_end|> <|im_start|> assistant"
    assert script.seen[-1] == [*first.completion.prompt_ids, *first.completion.ids[:-2]], "tokens in, tokens out"
    assert [message["role"] for message in first.messages] == ["assistant", "tool", "assistant"]
    assert (first.calls, first.failed_calls, second.calls, first.completion.ended) == (1, 0, 0, True)
    environments = {"environments": ["0/0", "1/0"]}
    scores = process("hidden", ["go"] * 2, [first.messages, second.messages], [[1]] * 2, {}, **environments).scores
    assert scores == [1.0, 0.0]
    rollouts = object.__new__(Rollouts)
    rollouts._task, rollouts._tokenizer, rollouts._shares_prompts = ReinforcementConfig(), tokenizer, False
    batch = rollouts._tensors([(first, True)])
    start = len(first.completion.prompt_ids)
    labels = batch["labels"][0, start : start + len(first.completion.ids)].tolist()
    assert [place for place, label in enumerate(labels) if label == NO_TARGET] == first.completion.read
    assert [label for label in labels if label != NO_TARGET] == [
        token for place, token in enumerate(first.completion.ids) if place not in first.completion.read
    ]


def test_limits_end_a_completion(act):
    rows = {n: {"prompt": "go", "word": "w1"} for n in range(3)}
    again = [f"{CALL} <|im_end|>"] * 9
    answers = {(0, 0): list(again), (1, 0): [f"{WRONG} <|im_end|>", "w1 <|im_end|>"], (2, 0): ["w1 w1 w1"]}
    (endless, wrong, cut), *_ = act(answers, rows=rows, turns=3, max_new_tokens=200)
    assert (endless.calls, endless.completion.ended, len(endless.messages)) == (2, False, 5)
    assert (wrong.calls, wrong.failed_calls, wrong.completion.ended) == (1, 1, True)
    assert "no tool 'none'" in wrong.messages[1]["content"]
    assert not cut.completion.ended
    answers = {(0, 0): list(again)}
    (short,), *_ = act(answers, rows={0: rows[0]}, turns=9, max_new_tokens=10)
    assert len(short.completion.ids) <= 10, "a result that leaves no room is not read"
    assert not short.completion.ended


def test_half_of_a_character_is_shown_as_a_question_mark(act):
    """No tokenizer takes it: a tool that returned it, or a model that wrote it as an argument, would end the run."""
    answers = {(0, 0): [f"{HALF} <|im_end|>", "ok <|im_end|>"]}
    (scored,), *_ = act(answers, rows={0: {"prompt": "go", "word": "w1"}})
    assert (scored.messages[1]["content"], scored.failed_calls, scored.completion.ended) == ("w1 ?", 0, True)
    (call,) = next(form for form in FORMS if form.name == "hermes").parse(
        r'<tool_call>{"name":"f","arguments":{"q":"\ud83d"}}</tool_call>'
    )
    assert json.loads(call["function"]["arguments"]) == {"q": "?"}


def test_an_environment_that_hangs_scores_nothing_and_the_run_goes_on(act):
    rows = {0: {"prompt": "go", "word": "w1"}}
    answers = {(0, 0): [f"{HANG} <|im_end|>", "w1 <|im_end|>"]}
    (hanging,), _, process, _ = act(answers, rows=rows, environment_seconds=2.0)
    assert "hang: its calls took longer than 2 s (task.environment_seconds)" in hanging.failures["hidden"]
    scores = process("hidden", ["go"], [hanging.messages], [[1]], {}, environments=["0/0"])
    assert scores.scores == [None]
    (later,), *_ = act({(0, 0): ["w1 <|im_end|>"]}, rows=rows)
    assert later.completion.ended


def test_calls_of_several_completions_run_at_the_same_time_each_with_its_own_clock(act):
    rows = {n: {"prompt": "go", "word": "w1"} for n in range(16)}
    answers = {(n, 0): [f"{WAIT} <|im_end|>", "w1 <|im_end|>"] for n in rows}
    answers[3, 0], answers[4, 0] = [[f"{call} <|im_end|>", "w1 <|im_end|>"] for call in (HANG, CALL)]
    scored, _, process, _ = act(answers, rows=rows, environment_seconds=10.0)
    assert [bool(each.failures) for each in scored] == [n == 3 for n in rows]
    assert [each.messages[1]["content"] for n, each in enumerate(scored) if n != 3] == ["w2"] * 3 + ["w1"] + ["w2"] * 11
    assert all(each.completion.ended for n, each in enumerate(scored) if n != 3)
    keys = [f"{n}/0" for n in rows]
    messages = [each.messages for each in scored]
    scores = process("hidden", ["go"] * 16, messages, [[1]] * 16, {}, environments=keys).scores
    assert scores == [None if n == 3 else float(n == 4) for n in rows], "the process and all other environments live on"


def test_where_only_one_may_run_at_a_time_it_runs_in_the_callers_thread():
    def thread_of(item: int) -> tuple[int, int]:
        return item, threading.get_ident()

    this = threading.get_ident()
    assert in_threads(thread_of, range(3), threads=1) == [(item, this) for item in range(3)]
    assert this not in {thread for _, thread in in_threads(thread_of, range(3), threads=2)}


def test_an_environment_that_fails_costs_its_own_episode(act):
    rows = {n: {"prompt": "go", "word": "w1"} for n in range(4)}
    rows[1]["fails"], rows[2]["word"] = "a column", "w3"
    answers = {(n, 0): [f"{CALL} <|im_end|>", "w1 <|im_end|>"] for n in (0, 2)}
    answers |= {(3, 0): [f"{LEAVE} <|im_end|>", "w1 <|im_end|>"]}
    (first, unset, _, left), _, process, _ = act(answers, rows=rows)
    assert unset.failures == {"hidden": "its environment failed: it could not be reset: KeyError: 'a column'"}
    assert (unset.completion.ids, unset.completion.ended) == ([], False)
    assert not first.failures and first.completion.ended
    assert (left.failed_calls, left.completion.ended) == (1, True), "it reads the error, as of every other exception"
    keys = ["0/0", "2/0", "3/0"]
    scores = process("hidden", ["go"] * 3, [["m"]] * 3, [[1]] * 3, {}, environments=keys)
    assert scores.scores == [1.0, None, 0.0]
    assert scores.failures == {1: Failure("ValueError: no such word")}


def test_what_an_environment_draws_is_the_same_again(act):
    rows = {n: {"prompt": "go", "word": None} for n in range(6)}

    def words() -> list[str]:
        answers = {(n, 0): [f"{CALL} <|im_end|>", "ok <|im_end|>"] for n in range(6)}
        return [scored.messages[1]["content"] for scored in act(answers, rows=rows)[0]]

    assert words() == words()
    assert set(words()) == {"w1", "w2"}


def test_a_class_for_trl_is_an_environment(act):
    act({(0, 0): ["ok <|im_end|>"]}, rows={0: {"prompt": "go"}})
    (schema,) = turns.tool_schemas("TrlStyle")
    assert schema["function"]["parameters"]["properties"] == {"amount": {"type": "integer", "description": "How much."}}
    process = RewardProcess(ReinforcementConfig(environment="TrlStyle", rewards=["counted"]))
    try:
        row = {"key": "0/0", "seed": 1, "columns": {"prompt": "p"}}
        process.ask({"kind": "reset", "environment": "TrlStyle", "rows": [row], "again": False}, 60, "")
        calls = [{"key": "0/0", "name": "add", "arguments": json.loads(text)} for text in ('{"amount": 2}', '{"x": 1}')]
        results = process.ask({"kind": "call", "calls": calls, "seconds": 60.0}, 60, "")["results"]
        assert [result["failed"] for result in results] == [False, True]
        assert results[0]["text"] == "2"
        assert process("counted", ["p"], ["c"], [[1]], {}, environments=["0/0"]).scores == [2.0]
    finally:
        process.close()


def test_tools_without_a_description_are_refused(act):
    act({(0, 0): ["ok <|im_end|>"]}, rows={0: {"prompt": "go"}})
    with pytest.raises(UserError, match=r"undescribed\.tool"):
        turns.tool_schemas("undescribed")
