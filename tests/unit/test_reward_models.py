"""Reward models: a classifier with one output in this process, and a server that has one."""

from __future__ import annotations

import json
import math
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from types import SimpleNamespace

import pytest
import torch
from support.tiny import save_decoder
from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

from dstune.config.schema import ModelConfig
from dstune.core.errors import UserError
from dstune.generation.completions import Completion
from dstune.tasks.reinforcement.grade import Graders
from dstune.tasks.reinforcement.outages import Failure, Patience
from dstune.tasks.reinforcement.records import Scored
from dstune.tasks.reinforcement.reward_model import conversation_of, load_reward_model
from dstune.tasks.reinforcement.scoring import Scorer


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    folder = save_decoder(tmp_path_factory.mktemp("judge") / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(1)
    settings = LlamaConfig.from_pretrained(folder)
    settings.num_labels, settings.pad_token_id = 1, tokenizer.pad_token_id
    model = LlamaForSequenceClassification(settings).eval()
    model.save_pretrained(folder)
    return folder, model, tokenizer


def test_a_classifier_scores_the_rendered_conversation(judge):
    folder, model, tokenizer = judge
    score = load_reward_model(str(folder), ModelConfig(path=str(folder)), 5.0)
    talks = [conversation_of("w1 w2", answer, {}) for answer in ("w3", "w4 w5 w6")]
    expected = []
    for talk in talks:
        ids = tokenizer.apply_chat_template(talk, return_dict=True, return_tensors="pt")
        with torch.no_grad():
            expected.append(float(model(**ids).logits[0, 0]))
    assert score(talks) == pytest.approx(expected, abs=1e-4)
    assert expected[0] != pytest.approx(expected[1], abs=1e-3)


def test_an_answer_without_text_takes_no_score_from_others(judge):
    folder, *_ = judge
    score = load_reward_model(str(folder), ModelConfig(path=str(folder)), 5.0)
    whole, empty = conversation_of("w1 w2", "w3", {}), conversation_of("w1 w2", "", {})
    (failure,) = score([empty])
    assert "empty" in failure.reason
    assert score([empty, whole, empty]) == [failure, *score([whole]), failure]
    assert load_reward_model(str(folder), ModelConfig(path="other"), 9.0) is score, "it is in memory once"


def test_what_is_no_reward_model_is_refused(tmp_path):
    with pytest.raises(UserError) as caught:
        load_reward_model(str(tmp_path / "nothing"), ModelConfig(path="x"), 5.0)
    assert caught.value.problems[0].where == "task.reward_models"


class Double(BaseHTTPRequestHandler):
    """Answers as `dstune serve` does: rewards by the length of the answer, and a judge that gives 7 of 10."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.seen.append((self.path, body))  # type: ignore[attr-defined]
        if self.path == "/rewards":
            if len(body["messages"]) > 64 or any(talk[-1]["content"] == "" for talk in body["messages"]):
                content = json.dumps({"error": {"message": "an answer is empty"}}).encode()
                self.send_response(400)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)
                return
            data = [{"index": n, "score": float(len(talk[-1]["content"]))} for n, talk in enumerate(body["messages"])]
            answer = {"data": data}
        else:
            said = "no JSON" if "silent" in body["messages"][0]["content"] else json.dumps({"result": 7, "steps": []})
            answer = {"choices": [{"message": {"role": "assistant", "content": said}}]}
        content = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *given) -> None:
        pass


@pytest.fixture
def server():
    double = HTTPServer(("127.0.0.1", 0), Double)
    double.seen = []
    thread = threading.Thread(target=double.serve_forever, daemon=True)
    thread.start()
    yield double, f"http://127.0.0.1:{double.server_port}"
    double.shutdown()
    double.server_close()


def test_a_server_is_asked_for_rewards(server):
    double, address = server
    score = load_reward_model(f"{address}#judge", ModelConfig(path="x"), 5.0)
    assert score([conversation_of("p", "abc", {"system": "s"}), conversation_of("p", "a", {})]) == [3.0, 1.0]
    path, body = double.seen[0]
    assert (path, body["model"], [turn["role"] for turn in body["messages"][0]]) == (
        "/rewards",
        "judge",
        ["system", "user", "assistant"],
    )
    double.shutdown()
    double.server_close()
    (failure,) = score([conversation_of("p", "abc", {})])
    assert isinstance(failure, Failure) and failure.may_pass, "a server that is gone gives no score"


def test_a_server_is_asked_for_what_it_takes(server):
    double, address = server
    score = load_reward_model(f"{address}#judge", ModelConfig(path="x"), 5.0)
    talks = [conversation_of("p", "a" * (number % 5 + 1), {}) for number in range(70)]
    talks[67] = conversation_of("p", "", {})
    refused = Failure("the server answered 400: an answer is empty")
    assert score(talks) == [refused if number == 67 else float(number % 5 + 1) for number in range(70)]
    assert [len(body["messages"]) for _, body in double.seen[:2]] == [64, 6]


def test_scores_that_are_no_numbers_are_none(monkeypatch):
    scorer = object.__new__(Scorer)
    scorer.names, scorer.process, scorer.logged = ["judge"], SimpleNamespace(), {}
    scorer._models = {"judge": lambda talks: [0.5, math.nan, -math.inf, Failure("one failed")]}
    scorer.patience = Patience(0.0)
    scorer._task = SimpleNamespace(environment=None, overlong_tokens=0)
    monkeypatch.setattr(Scorer, "columns_of", lambda self, prompt: {"prompt": "p"})
    batch = [Scored(Completion(0, number, [1], [], 0.0, True), "a", []) for number in range(4)]
    scorer._score_batch(batch, {})
    assert [scored.scores for scored in batch] == [[0.5], [None], [None], [None]]
    assert [scored.failures for scored in batch] == [{}, {}, {"judge": "it returned -inf"}, {"judge": "one failed"}]


def test_a_model_grades_within_its_range(server):
    double, address = server
    grader = {"type": "score_model", "name": "g", "model": "m", "range": [0, 5], "sampling_params": {"temperature": 0},
              "input": [{"role": "user", "content": "{{ item.kind }}: {{ sample.output_text }}"}]}  # fmt: skip
    graders = Graders(
        {"g": grader, "wide": {**grader, "range": [0, 10]}}, seconds=5.0, judge=address, judge_key="secret"
    )
    assert graders.score("g", ["a"], {"kind": ["x"]}) == [5.0]
    assert graders.score("wide", ["a"], {"kind": ["x"]}) == [7.0]
    (silent,) = graders.score("g", ["a"], {"kind": ["silent"]})
    assert isinstance(silent, Failure)
    path, body = double.seen[0]
    assert (path, body["messages"][0]["content"], body["temperature"]) == ("/v1/chat/completions", "x: a", 0)
    (alone,) = Graders({"g": grader}).score("g", ["a"], {"kind": ["x"]})
    assert alone == Failure("model_grader_server_error: task.judge names no server"), "without a server"
