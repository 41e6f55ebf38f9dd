"""Encoders of the local engine over a predictor made by hand: rows of several requests together, each row once."""

from __future__ import annotations

import asyncio
import json
import threading
from types import SimpleNamespace

import httpx2
import numpy as np
import pytest
import torch

from dstune.core.errors import UserError
from dstune.serve.engines.local.encoders import EncoderApp
from dstune.serve.source import with_neutral_labels
from tests.support.serving import stub_source


def _texts(rows):
    return [next(iter(row.row.values())) for row in rows]


class Predictor:
    """Vectors by the length of a text."""

    labels: tuple[str, ...] = ()
    longest = 64
    model = torch.nn.Linear(1, 1)

    def __init__(self):
        self.asked: list[list[str]] = []
        self.tokenized_by: set[str] = set()

    @property
    def config(self):
        from dstune.config.compose import compose

        return compose(["task=embedding", "data=files", "data.train=x.jsonl", "model.path=x"]).config

    def samples(self, rows):
        self.tokenized_by.add(threading.current_thread().name)
        texts = _texts(rows)
        return [
            SimpleNamespace(
                row=number, input_ids=np.arange(min(len(text.split()), self.longest)), length=len(text.split())
            )
            for number, text in enumerate(texts)
        ]

    def answers_of(self, samples, rows, batch_size, *, all_labels):
        texts = _texts(rows)
        self.asked.append(texts)
        if "bad" in texts:
            raise RuntimeError("out of memory")
        cut = [{"truncated": True} if sample.length > self.longest else {} for sample in samples]
        return [self.answer(text) | own for text, own in zip(texts, cut, strict=True)]

    def answer(self, text):
        return {"vector": [float(len(text)), 1.0]}


class Classifier(Predictor):
    """Predicts the first word of a text, or its words in a model of several labels."""

    def __init__(self, labels, *, several=False):
        super().__init__()
        self.labels, self.several = labels, several

    @property
    def config(self):
        from dstune.config.compose import compose

        words = ["task=classification", "data=files", "data.train=x.jsonl", "model.path=x"]
        return compose([*words, f"task.multi_label={str(self.several).lower()}"]).config

    def answer(self, text):
        words = text.split()
        predicted = [word for word in words if word in self.labels] if self.several else words[0]
        return {"predicted": predicted, "probabilities": {label: float(label in words) for label in self.labels}}


def asking(predictor, neutral=()):
    app = EncoderApp("m", predictor, neutral)

    def run(*requests):
        async def main():
            transport = httpx2.ASGITransport(app=app)
            async with httpx2.AsyncClient(transport=transport, base_url="http://engine", timeout=60) as client:
                return await asyncio.gather(*(client.post(path, json=body) for path, body in requests))

        return asyncio.run(main())

    run.predictor = predictor
    return run


@pytest.fixture
def ask():
    return asking(Predictor())


def test_a_query_is_computed_once(ask):
    (answer,) = ask(("/rerank", {"query": "aa", "documents": ["aa", "a", "aa"]}))
    assert [one["index"] for one in answer.json()["results"]] == [0, 2, 1]
    assert ask.predictor.asked == [["aa", "a"]]


def test_every_answer_says_what_it_took(ask):
    """By that the gateway counts what a key may use in a day; the query is read once."""
    rows = ({"query": "a b", "documents": ["a b", "c"]}, {"query": "a b", "texts": ["c"]})
    asked = [("/rerank", row) for row in rows] + [("/score", {"text_1": "a b", "text_2": ["c", "d"]})]
    asked.append(("/v1/embeddings", {"input": ["a b", "c"]}))
    assert [one.json()["usage"]["total_tokens"] for one in ask(*asked)] == [3, 3, 4, 3]


def test_what_goes_wrong_with_one_request_ends_it_alone(ask):
    requests = [("/v1/embeddings", {"input": text}) for text in ("a", "bad", "a b c")]
    found = ask(*requests, *requests)
    assert [one.status_code for one in found] == [200, 500, 200] * 2
    assert [one.json()["usage"]["total_tokens"] for one in found if one.status_code == 200] == [1, 3] * 2
    assert "out of memory" in json.dumps(found[1].json())


def test_one_thread_uses_the_tokenizer(ask):
    ask(("/v1/embeddings", {"input": ["a", "b c"]}), ("/parity", {"rows": [{"text": "a"}]}))
    assert ask.predictor.tokenized_by == {"compute"}


LONG = " ".join(["ham"] * 500)


def test_a_text_that_is_too_long_has_no_vector(ask):
    """A vector of its first 64 tokens would stand for all of it."""
    whole = " ".join(["a"] * 64)
    long = [("/v1/embeddings", {"input": ["a", LONG]}), ("/score", {"text_1": "a", "text_2": LONG})]
    long.append(("/rerank", {"query": "a", "documents": [LONG]}))
    fine, *refused = ask(("/v1/embeddings", {"input": whole}), *long)
    assert fine.status_code == 200 and [answer.status_code for answer in refused] == [400] * 3
    error = refused[0].json()["error"]
    assert error["code"] == "context_length_exceeded" and error["param"] == "input"
    assert "input[1]" in error["message"] and "500" in error["message"] and "64" in error["message"]


def test_a_classifier_says_what_it_has_not_read():
    ask = asking(Classifier(("ham", "spam")))
    (answer,) = ask(("/classify", {"input": ["spam", LONG]}))
    whole, cut = answer.json()["data"]
    assert "truncated" not in whole
    assert cut["label"] == "ham" and (cut["truncated"], cut["tokens"], cut["tokens_read"]) == (True, 500, 64)


def test_a_reranker_says_what_it_has_not_read():
    ask = asking(Classifier(("no", "yes")))
    requests = [("/score", {"text_1": "a", "text_2": "b"}), ("/score", {"text_1": LONG, "text_2": "b"})]
    requests += [("/rerank", {"query": LONG, kind: ["b"]}) for kind in ("documents", "texts")]
    whole, cut, documents, texts = (answer.json() for answer in ask(*requests))
    assert "truncated" not in whole["data"][0] and cut["data"][0]["truncated"] is True
    assert documents["results"][0]["tokens"] == 500 and texts["items"][0]["tokens_read"] == 64


def flagged(answer) -> list[bool]:
    return [result["flagged"] for result in answer.json()["results"]]


def test_moderations_flag_all_but_the_neutral_label():
    for neutral, labels in (("ham", ("ham", "spam")), ("Not_Toxic", ("Not_Toxic", "spam"))):
        (answer,) = asking(Classifier(labels))(("/v1/moderations", {"input": [neutral, "spam"]}))
        assert flagged(answer) == [False, True]
    (answer,) = asking(Classifier(("pos", "neg")), ["pos"])(("/v1/moderations", {"input": ["pos", "neg"]}))
    assert flagged(answer) == [False, True]
    (answer,) = asking(Classifier(("ham", "spam")), ["spam"])(("/v1/moderations", {"input": ["ham", "spam"]}))
    assert flagged(answer) == [True, False]


def test_moderations_are_refused_where_nobody_says_what_is_neutral():
    (answer,) = asking(Classifier(("pos", "neg")))(("/v1/moderations", {"input": "pos"}))
    assert answer.status_code == 400 and "--neutral-label m=LABEL" in answer.json()["error"]["message"]
    # With several labels a text may have none, and each one is a category.
    (answer,) = asking(Classifier(("hate", "threat"), several=True))(("/v1/moderations", {"input": ["hate", "a"]}))
    assert flagged(answer) == [True, False]


def test_moderations_pass_over_no_part_of_a_text():
    (answer,) = asking(Classifier(("ham", "spam")))(("/v1/moderations", {"input": LONG + " spam"}))
    assert answer.status_code == 400 and answer.json()["error"]["code"] == "context_length_exceeded"


def test_a_neutral_label_is_one_of_the_model():
    with pytest.raises(UserError) as refused:
        EncoderApp("m", Classifier(("pos", "neg")), ["positive"])
    assert [(problem.where, problem.value) for problem in refused.value.problems] == [("--neutral-label", "m=positive")]


def test_neutral_labels_are_declared_by_name():
    classifier = stub_source("a=b", task="classification", generates=False, serves=("classify",))
    others = [stub_source("chat"), stub_source("a", task="classification", generates=False, serves=("classify",))]
    words = ["a=b=x", "a=c=d", "a=b=y=z"]
    labels = {one.name: one.neutral_labels for one in with_neutral_labels([classifier, *others], words)}
    assert labels == {"a=b": ("x", "y=z"), "a": ("c=d",), "chat": ()}
    for word in ("chat=x", "a=", "x"):
        with pytest.raises(UserError) as refused:
            with_neutral_labels(others, [word])
        assert [problem.value for problem in refused.value.problems] == [word]
