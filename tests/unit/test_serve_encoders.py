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

from dstune.serve.engines.local.encoders import EncoderApp


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
            SimpleNamespace(row=number, input_ids=np.arange(len(text.split()))) for number, text in enumerate(texts)
        ]

    def answers_of(self, samples, rows, batch_size, *, all_labels):
        texts = _texts(rows)
        self.asked.append(texts)
        if "bad" in texts:
            raise RuntimeError("out of memory")
        return [{"vector": [float(len(text)), 1.0]} for text in texts]


@pytest.fixture
def ask():
    predictor = Predictor()
    app = EncoderApp("m", predictor)

    def run(*requests):
        async def main():
            transport = httpx2.ASGITransport(app=app)
            async with httpx2.AsyncClient(transport=transport, base_url="http://engine", timeout=60) as client:
                return await asyncio.gather(*(client.post(path, json=body) for path, body in requests))

        return asyncio.run(main())

    run.predictor = predictor
    return run


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
