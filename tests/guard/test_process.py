"""Windows of several texts share the model, and what a conversation shares is sent once."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from types import SimpleNamespace

import pytest

from dstune.guard.check import Text, _pieces
from dstune.guard.model import BATCH
from dstune.guard.process import Compute, GuardApp
from dstune.guard.scanner import Item, Scanner
from dstune.guard.wire import items_from_json, items_to_json


class Recording:
    """A model that notes what it is given together, and starts when it may."""

    def __init__(self):
        self.batches: list[list[int]] = []
        self.may = threading.Event()

    def score_windows(self, windows):
        self.may.wait(10)
        self.batches.append([window[0] for window in windows])
        if any(window[0] < 0 for window in windows):
            raise ValueError("no such token")
        return [window[0] / 1000 for window in windows]


def test_a_conversation_goes_over_once():
    """Each of its answers is held against all that its users wrote; that is not sent with each."""
    policy = SimpleNamespace(watches=lambda _: (), links=("a.example",), canaries=("c",), codes=True)
    policy.limits, policy.document_markers = SimpleNamespace(windows=7), ()
    policy.watches = lambda direction: (SimpleNamespace(detector="secrets", action="block"),)
    talk = [Text("the rules", "system")]
    talk += [Text(f"{role} {number} " + "x" * 100, role) for number in range(500) for role in ("user", "assistant")]
    items = [piece.item for piece in _pieces(policy, talk)]
    sent = json.dumps(items_to_json(items))
    assert len(items) == 1000 and len(sent) < 10 * sum(len(one.text) for one in talk)
    assert items_from_json(json.loads(sent)) == items


def test_a_long_text_does_not_hold_up_a_short_one():
    model = Recording()

    async def run():
        compute = Compute({"prompt_attack": model})
        done: list[str] = []

        async def score(name, windows):
            scores = await compute.scores("prompt_attack", windows, name)
            done.append(name)
            return scores

        tasks = [asyncio.create_task(score("long", [[number] for number in range(400)]))]
        await asyncio.sleep(0.05)
        tasks += [asyncio.create_task(score(f"short {number}", [[500 + number]])) for number in range(3)]
        await asyncio.sleep(0.05)
        model.may.set()
        found = await asyncio.gather(*tasks)
        assert await compute.scores("prompt_attack", [], "none") == []
        return done, found

    done, found = asyncio.run(run())
    assert done[-1] == "long" and set(done[:3]) == {"short 0", "short 1", "short 2"}
    assert found[0] == [number / 1000 for number in range(400)] and found[2] == [0.501]
    assert all(len(batch) <= BATCH for batch in model.batches) and len(model.batches) < 400 / BATCH + 3
    assert sum(map(len, model.batches)) == 403


def test_many_short_texts_do_not_hold_up_another_request():
    """They were scored in the order in which they came: 4,096 texts before the first of anybody else."""
    model = Recording()

    async def run():
        compute = Compute({"prompt_attack": model})
        many = [asyncio.create_task(compute.scores("prompt_attack", [[1]], "many")) for _ in range(4096)]
        await asyncio.sleep(0.05)
        other = asyncio.create_task(compute.scores("prompt_attack", [[2]] * 20, "other"))
        await asyncio.sleep(0.05)
        model.may.set()
        await other
        waiting = sum(not one.done() for one in many)
        await asyncio.gather(*many)
        return waiting

    assert asyncio.run(run()) > 1000
    turns = [number for number, batch in enumerate(model.batches) if 2 in batch]
    assert turns == [1, 2, 3]  # half of each turn is its own
    assert max(map(len, model.batches)) <= BATCH


def test_silence_is_the_duration_of_a_step_and_a_queue_has_none():
    """A search or a turn without an end is seen; many requests, each of which waits long, are not taken for one."""
    model = Recording()
    may = threading.Event()

    class Slow(Scanner):
        def prepare(self, item):
            may.wait(10)
            return super().prepare(item)

    async def run():
        app = GuardApp(Slow({}))
        assert app.seconds_without_progress() == 0
        many = asyncio.create_task(app.scan([Item("x", "input", frozenset())] * 50))
        await asyncio.sleep(0.5)
        assert app.seconds_without_progress() > 0.4
        may.set()
        await many
        assert app.seconds_without_progress() == 0
        compute = Compute({"prompt_attack": model})
        assert compute.seconds_without_progress() == 0
        waits = asyncio.create_task(compute.scores("prompt_attack", [[1]] * BATCH * 20, "one"))
        await asyncio.sleep(0.5)
        assert compute.seconds_without_progress() > 0.4
        model.score_windows = lambda windows: time.sleep(0.1) or [0.0] * len(windows)
        model.may.set()
        silent = []
        while not waits.done():
            await asyncio.sleep(0.05)
            silent.append(compute.seconds_without_progress())
        assert sorted(silent)[len(silent) // 2] < 0.4 and compute.seconds_without_progress() == 0

    asyncio.run(run())


def test_searches_take_turns_by_request():
    """One search after the other, as the lock of the interpreter has them: another request's text is among the first."""
    order: list[str] = []
    may = threading.Event()

    class Slow(Scanner):
        def prepare(self, item):
            may.wait(10)
            order.append(item.text)
            return super().prepare(item)

    async def run():
        app = GuardApp(Slow({}))
        many = asyncio.create_task(app.scan([Item("many", "input", frozenset())] * 2000))
        await asyncio.sleep(0.05)
        other = asyncio.create_task(app.scan([Item("other", "input", frozenset())] * 2))
        await asyncio.sleep(0.05)
        may.set()
        assert len(await many) == 2000 and len(await other) == 2

    asyncio.run(run())
    assert [number for number, text in enumerate(order) if text == "other"][-1] < 200


def test_a_text_that_nobody_waits_for_is_dropped_and_a_fault_is_one_texts():
    model = Recording()

    async def run():
        compute = Compute({"prompt_attack": model})
        first = asyncio.create_task(compute.scores("prompt_attack", [[1]] * BATCH, "first"))
        await asyncio.sleep(0.05)
        left = asyncio.create_task(compute.scores("prompt_attack", [[2]] * 1000, "left"))
        await asyncio.sleep(0.05)
        left.cancel()
        await asyncio.wait([left])  # its future is cancelled by then, however late this loop gets a core
        model.may.set()
        assert await first == [0.001] * BATCH
        with pytest.raises(RuntimeError, match="no such token"):
            await compute.scores("prompt_attack", [[-1]], "wrong")
        assert await compute.scores("prompt_attack", [[3]], "right") == [0.003]

    asyncio.run(run())
    assert sum(batch.count(2) for batch in model.batches) == 0


def test_models_take_turns():
    models = {name: Recording() for name in ("prompt_attack", "moderated_content/hate")}
    for model in models.values():
        model.may.set()

    async def run():
        compute = Compute(models)
        windows = [[number] for number in range(100)]
        began = time.monotonic()
        await asyncio.gather(*(compute.scores(name, windows, one) for name in models for one in range(3)))
        return time.monotonic() - began

    assert asyncio.run(run()) < 10
    assert {sum(map(len, model.batches)) for model in models.values()} == {300}
