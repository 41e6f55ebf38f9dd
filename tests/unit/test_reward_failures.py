"""Rewards that fail: what may pass is asked again, what repeats costs its completion, and what does not apply costs nothing."""

from __future__ import annotations

import json
import math
import threading
import urllib.error
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest

from dstune.core import plugins
from dstune.core.errors import UserError
from dstune.generation.completions import Completion
from dstune.tasks.reinforcement import outages
from dstune.tasks.reinforcement.config import ReinforcementConfig
from dstune.tasks.reinforcement.metrics import reinforcement_metrics, reward_of, rollout_sums
from dstune.tasks.reinforcement.outages import Failure, Patience, may_pass
from dstune.tasks.reinforcement.records import Scored, pack_scored, unpack_scored
from dstune.tasks.reinforcement.reward_process import RewardProcess
from dstune.tasks.reinforcement.rollout import Rollouts
from dstune.tasks.reinforcement.scoring import Scorer
from dstune.trainer.rollouts import RolloutsFailed


class Timeout(Exception):
    """As `requests` names it."""


class ApiStatusError(Exception):
    """As clients of OpenAI's API raise it."""

    def __init__(self, status_code: int):
        super().__init__(f"Error code: {status_code}")
        self.status_code = status_code


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ConnectionRefusedError(111, "refused"), True), (TimeoutError("timed out"), True), (Timeout("slow"), True),
        (urllib.error.URLError("unreachable"), True), (ApiStatusError(503), True), (ApiStatusError(429), True),
        (urllib.error.HTTPError("http://h", 502, "bad gateway", {}, None), True),
        (urllib.error.HTTPError("http://h", 401, "who are you", {}, None), False), (ApiStatusError(400), False),
        (KeyError("answer"), False), (FileNotFoundError(2, "none"), False), (ValueError("no number"), False),
    ],
)  # fmt: skip
def test_what_may_pass(error, expected):
    assert may_pass(error) is expected
    wrapped = RuntimeError("the judge")
    wrapped.__cause__ = error
    assert may_pass(wrapped) is expected


@pytest.fixture
def clock(monkeypatch):
    """Pauses that take no time."""
    time = SimpleNamespace(now=0.0, pauses=[])

    def sleep(seconds):
        time.pauses.append(seconds)
        time.now += seconds

    monkeypatch.setattr(outages, "time", SimpleNamespace(monotonic=lambda: time.now, sleep=sleep))
    return time


def test_pauses_grow_until_the_server_answers(clock):
    down, asked = Failure("down", True), []

    def ask(items):
        asked.append(list(items))
        return [down] * len(items) if len(asked) < 9 else [item * 2 for item in items]

    patience = Patience(600.0)
    assert patience.ask([1, 2], ask) == [2, 4]
    assert clock.pauses == [0.25, 0.5, 1, 2, 4, 8, 10, 10]
    assert not patience.outage


def test_a_server_that_stays_down_is_given_up_once(clock):
    down = Failure("down", True)
    patience = Patience(60.0)
    assert patience.ask([1, 2], lambda items: [down] * len(items)) == [down, down]
    assert patience.outage == "down"
    assert 50 < clock.now <= 60
    seen = len(clock.pauses)
    patience.ask([3], lambda items: [down])
    assert len(clock.pauses) == seen, "later completions do not wait again"


def test_a_completion_that_always_fails_costs_a_few_attempts(clock):
    asked = []

    def ask(items):
        asked.append(list(items))
        return [Failure("500", True) if item == 2 else float(item) for item in items]

    patience = Patience(600.0)
    assert patience.ask([1, 2, 3], ask) == [1.0, Failure("500", True), 3.0]
    assert asked == [[1, 2, 3], [2], [2], [2], [2]]
    assert not patience.outage
    assert Patience(600.0).ask([1], lambda items: [Failure("wrong")]) == [Failure("wrong")]
    assert Patience(0.0).ask([1], lambda items: [Failure("down", True)]) == [Failure("down", True)]
    assert len(clock.pauses) == 4


class Judge(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked += 1
        is_up = self.server.asked > self.server.failures and "poison" not in body["messages"][0]["content"]
        self.send_response(200 if is_up else 503)
        self.end_headers()
        if is_up:
            self.wfile.write(json.dumps({"choices": [{"message": {"content": '{"result": 0.5}'}}]}).encode())

    def log_message(self, *arguments):
        pass


@pytest.fixture
def judge():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Judge)
    server.asked, server.failures = 0, 0
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def scorer_of(task: ReinforcementConfig) -> Scorer:
    scorer = object.__new__(Scorer)
    scorer._task, scorer._split, scorer._models, scorer._rows, scorer.logged = task, None, {}, {}, {}
    scorer.names, scorer.process, scorer.patience = (
        task.reward_names,
        RewardProcess(task),
        Patience(task.reward_retry_seconds),
    )
    scorer._rows = {0: ({"prompt": "p", "answer": "4"}, [1])}
    return scorer


def completions_of(*texts: str, **further) -> list[Scored]:
    return [
        Scored(Completion(0, number, [1, 2], [-1.0, -1.0], 0.0, True), text, **further)
        for number, text in enumerate(texts)
    ]


def test_a_judge_that_answers_503_is_asked_again(judge, tmp_path):
    grader = {"type": "score_model", "name": "g", "model": "m",
              "input": [{"role": "user", "content": "{{ sample.output_text }}"}]}  # fmt: skip
    file = tmp_path / "g.json"
    file.write_text(json.dumps(grader))
    address = f"http://127.0.0.1:{judge.server_port}"
    scorer = scorer_of(ReinforcementConfig(graders=[str(file)], judge=address, reward_retry_seconds=30.0))
    judge.failures = 3
    batch = completions_of("a", "b")
    try:
        scorer.score([batch], {})
        assert [scored.scores for scored in batch] == [[0.5], [0.5]]
        batch = completions_of("a", "poison")
        scorer.score([batch], {})
        assert [scored.scores for scored in batch] == [[0.5], [None]]
        assert "503" in batch[1].failures["g"]
        assert not batch[0].failures
    finally:
        scorer.close()


def test_built_in_rewards_read_the_last_answer_of_a_conversation():
    names = ["exact_answer", "number", "brevity", "reasoning_format", "json_object"]
    turns = [{"role": "assistant", "content": "3?", "tool_calls": []}, {"role": "tool", "content": "4"},
             {"role": "assistant", "content": "4"}]  # fmt: skip
    task = ReinforcementConfig(rewards=names, environment="any")
    scorer = scorer_of(ReinforcementConfig(rewards=names))
    scorer._task = task
    batch = completions_of("3? 4 4", messages=turns)
    batch[0].completion.ids, batch[0].completion.read = [1] * 130, list(range(2))
    try:
        scorer.names = names
        scorer.score([batch], {})
        assert not batch[0].failures
        assert batch[0].scores == [1.0, 1.0, 0.5, 0.0, 0.0]
    finally:
        scorer.close()


MIXED = """
import dstune

@dstune.reward
def some(prompts, completions, **columns):
    if "raise" in completions:
        raise KeyError("answer")
    return [None if text == "other" else float("inf") if text == "much" else 1.0 for text in completions]
"""


def test_none_is_no_failure_and_a_failure_leaves_its_completion_out(tmp_path):
    file = tmp_path / "some.py"
    file.write_text(MIXED)
    plugins.activate([str(file)])
    task = ReinforcementConfig(rewards=["some", "exact_answer"])
    scorer = scorer_of(task)
    try:
        batch = completions_of("other", "x", "much", "4")
        scorer.score([batch], {})
        assert [scored.scores for scored in batch] == [[None, 0.0], [1.0, 0.0], [None, 0.0], [1.0, 1.0]]
        assert [list(scored.failures) for scored in batch] == [[], [], ["some"], []]
        rewards = [reward_of(scored, task.weights) for scored in batch]
        assert rewards[:2] == [0.0, 1.0]
        assert math.isnan(rewards[2]), "the other rewards alone would compare it with complete sums"
        again = unpack_scored(json.loads(json.dumps(pack_scored(batch[2]))))
        assert again.failures == batch[2].failures, "a resumed run must leave it out too"
        metrics = reinforcement_metrics(rollout_sums(task, [batch]))
        assert metrics["rewards/some/failed"] == 0.25
        assert metrics["rewards/exact_answer/failed"] == 0
        none = completions_of("other", "other")
        scorer.score([none], {})
        metrics = reinforcement_metrics(rollout_sums(task, [none]))
        assert "rewards/some/mean" not in metrics, "no score is no score of 0"
    finally:
        scorer.close()
        plugins.activate([])


def refusal_of(task: ReinforcementConfig, failed: int, *, is_first: bool, scores=(1.0,)) -> str:
    rollouts = object.__new__(Rollouts)
    rollouts._task = task
    batch = completions_of(*"abcd")
    for number, scored in enumerate(batch):
        scored.scores = [None] if number < failed else list(scores)
        scored.failures = {"number": "KeyError: 'answer'"} if number < failed else {}
    try:
        rollouts._refuse_failed(batch, is_first=is_first)
    except (RolloutsFailed, UserError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def test_the_share_of_failed_scores_has_a_limit():
    task = ReinforcementConfig(rewards=["number"])
    assert [bool(refusal_of(task, failed, is_first=False)) for failed in range(5)] == [False] * 4 + [True]
    task = ReinforcementConfig(rewards=["number"], max_failed_share=0.25)
    assert [bool(refusal_of(task, failed, is_first=False)) for failed in range(5)] == [False, False, True, True, True]
    assert "2 of 4 completions: KeyError: 'answer'" in refusal_of(task, 2, is_first=False)
    assert refusal_of(task, 2, is_first=False).startswith("RolloutsFailed"), "what was trained is saved"
    assert refusal_of(task, 2, is_first=True).startswith("UserError")
    task = ReinforcementConfig(rewards=["number"], max_failed_share=0.0)
    assert [bool(refusal_of(task, failed, is_first=False)) for failed in range(2)] == [False, True]
    assert not refusal_of(task, 0, is_first=False, scores=(None,)), "rewards that do not apply to a step"
    assert "returned None" in refusal_of(task, 0, is_first=True, scores=(None,))
