"""Clients of the local engine have their turns: whoever sends much waits for its own prompts alone."""

from __future__ import annotations

import asyncio
import time
from types import SimpleNamespace

import pytest

from dstune.generation.sampler import Chosen
from dstune.generation.text import MOST_UNFINISHED, TextStream
from dstune.serve.engines.local import encoder_batches
from dstune.serve.engines.local.encoder_batches import Batcher
from dstune.serve.turns import CLIENT
from tests.support.local_engine import Engine, body


def test_prompts_are_read_in_turn(engine, monkeypatch):
    original, order = engine.model.text_ids, []

    def slow(name, text):
        order.append(text)
        time.sleep(0.05)
        return original(name, text)

    monkeypatch.setattr(engine.model, "text_ids", slow)

    async def test(client):
        async def asked(name, *prompts):
            given = {"model": "base", "prompt": list(prompts), "max_tokens": 1, "client": name}
            return (await client.post("/v1/completions", json=given)).status_code

        first = [asyncio.create_task(asked("a", *["w1"] * 4)) for _ in range(3)]
        await asyncio.sleep(0.02)
        assert await asked("b", "w2") == 200
        return [*await asyncio.gather(*first)]

    assert engine.run(test) == [200] * 3
    assert order.index("w2") <= 2 and len(order) == 13


def test_rows_of_encoders_are_computed_in_turn_and_in_parts(monkeypatch):
    monkeypatch.setattr(encoder_batches, "MOST_CHARACTERS", 100)
    computed: list[list[str]] = []

    class Slow(Batcher):
        def _compute(self, rows):
            computed.append([row.row["text"] for row in rows])
            time.sleep(0.05)
            return [row.row["text"] for row in rows]

    async def main():
        batcher = Slow(SimpleNamespace())

        async def asked(name, *texts):
            CLIENT.set(name)
            return await batcher.answers([SimpleNamespace(row={"text": text}) for text in texts])

        first = [asyncio.create_task(asked("a", *[f"{n}" * 60 for n in range(4)])) for _ in range(2)]
        await asyncio.sleep(0.02)
        assert await asked("b", "x", "y") == ["x", "y"]
        for answers in await asyncio.gather(*first):
            assert [text[0] for text in answers] == ["0", "1", "2", "3"]

    asyncio.run(main())
    place = next(number for number, texts in enumerate(computed) if "x" in texts)
    assert place <= 2 and all(len("".join(texts)) <= 130 for texts in computed)


def test_answers_are_written_in_turn_and_one_client_does_not_fill_the_queue(folder):
    own = Engine(folder, max_sequences=1, max_waiting=8)
    done: list[str] = []

    async def test(client):
        async def asked(name, tokens):
            given = body(max_tokens=tokens, logit_bias={"4": -100}) | {"client": name}
            status = (await client.post("/v1/chat/completions", json=given)).status_code
            done.append(name)
            return status

        first = [asyncio.create_task(asked("a", 60)) for _ in range(10)]
        while len(done) < 3:  # the refusals: the others are in the queue
            await asyncio.sleep(0.001)
        assert await asked("b", 2) == 200
        return await asyncio.gather(*first)

    try:
        told = own.run(test)
    finally:
        own.close()
    assert set(told) == {200, 503} and told.count(200) in (6, 7), "three quarters of eight wait, one may be written"
    assert done.index("b") - told.count(503) <= 3, (
        "behind the one that was written and its client's next, not behind all of them"
    )


@pytest.mark.parametrize("text", ["", "\N{REPLACEMENT CHARACTER}"])
def test_tokens_without_a_text_take_no_more_time_the_more_they_are(text):
    """Somebody who forces bytes that are no character by `logit_bias` would stop all other answers."""
    decoded = 0

    def decode(ids):
        nonlocal decoded
        decoded += len(ids)
        return text * len(ids)

    stream = TextStream(decode, frozenset({99}), (), 5000)
    written = "".join(stream.push(Chosen(1)).text for _ in range(4000))
    assert decoded < 4000 * 200
    assert len(written) + 2 * MOST_UNFINISHED > 4000 * len(text) >= len(written)
