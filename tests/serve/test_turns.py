"""Threads that clients share: whoever brings much waits for its own work alone."""

from __future__ import annotations

import asyncio
import threading

import pytest

from dstune.serve.turns import TurnThreads


def test_each_client_has_its_turn():
    async def main():
        threads, gate, order = TurnThreads("test"), threading.Event(), []
        first = asyncio.create_task(threads.run("a", gate.wait))
        await asyncio.sleep(0.05)  # it is under way
        names = ["a1", "a2", "a3", "b1", "c1", "b2"]
        tasks = [
            asyncio.create_task(threads.run(name[0], lambda name=name: order.append(name) or name)) for name in names
        ]
        await asyncio.sleep(0)
        tasks[1].cancel()
        await asyncio.sleep(0.05)
        assert len(threads._turns) == 5, "what nobody waits for is not kept"
        gate.set()
        found = await asyncio.gather(first, *tasks, return_exceptions=True)
        assert order == ["a1", "b1", "c1", "a3", "b2"]
        assert isinstance(found.pop(2), asyncio.CancelledError) and found == [True, "a1", "a3", "b1", "c1", "b2"]

    asyncio.run(main())


def test_a_client_has_one_of_several_threads():
    async def main():
        threads, gate = TurnThreads("test", 2), threading.Event()
        slow = [asyncio.create_task(threads.run("a", gate.wait)) for _ in range(3)]
        await asyncio.sleep(0.05)  # the first is under way
        assert await asyncio.wait_for(threads.run("b", lambda: 5), 20) == 5
        gate.set()
        assert await asyncio.gather(*slow) == [True] * 3, "the client's other work has its turn too"

    asyncio.run(main())


def test_an_error_is_the_caller_s_and_the_thread_goes_on():
    async def main():
        threads = TurnThreads("test")
        with pytest.raises(ZeroDivisionError):
            await threads.run("a", lambda: 1 // 0)
        assert await threads.run("a", lambda: 5) == 5

    asyncio.run(main())
