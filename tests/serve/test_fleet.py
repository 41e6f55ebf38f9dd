"""Engines that are killed, that do not start, and that end with the server."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

import httpx2
import pytest

from dstune.core.errors import Problem, UserError
from dstune.serve.engines.base import Command, Engine, EngineDown, Limits
from dstune.serve.fleet import Fleet
from dstune.serve.gateway.app import Gateway
from dstune.serve.gateway.recording import Recorder
from dstune.serve.gateway.routes import ROUTES
from dstune.serve.gateway.settings import Settings
from dstune.serve.parity import Proof, Refused
from dstune.serve.store.database import Database
from tests.support.serving import (
    ProcessEngine,
    StubApp,
    StubEngine,
    chat,
    listening,
    served,
    stub_source,
    until,
    write_reference,
)


def test_an_engine_that_is_killed_under_load_is_started_again(tmp_path):
    """Every request is answered by the engine, or refused with 503 and a time to try again."""

    async def test():
        async with served(tmp_path, names=["first"], seconds=0.01, process=True) as found:
            client = found.client()
            engine = found.fleet.models["first"].engine
            for number in range(2):
                posts = [client.post("/v1/chat/completions", json=chat("a b c")) for _ in range(24)]
                tasks = [asyncio.create_task(post) for post in posts]
                await asyncio.sleep(0.03)
                os.killpg(engine.process.pid, signal.SIGKILL)
                for answer in await asyncio.gather(*tasks):
                    assert answer.status_code in (200, 503), answer.text
                    if answer.status_code == 200:
                        assert answer.json()["choices"][0]["message"]["content"] == "a b c"
                    else:
                        assert answer.headers["retry-after"]
                await until(lambda count=number + 2: not found.fleet.ready or engine.starts == count)
                await until(lambda: found.fleet.ready)
                assert (await client.post("/v1/chat/completions", json=chat("a b"))).status_code == 200
            assert found.fleet.restarts() == {"first": 2}

    asyncio.run(test())


def test_a_stream_that_is_cut_does_not_look_complete(tmp_path):
    import httpx2

    async def test():
        async with served(tmp_path, names=["first"], seconds=0.05, process=True) as found:
            lines: list[str] = []

            async def read() -> None:
                async with found.client().stream(
                    "POST", "/v1/chat/completions", json=chat("w " * 100, stream=True)
                ) as answer:
                    async for line in answer.aiter_lines():
                        lines.append(line)
                        if len(lines) == 3:
                            os.killpg(found.fleet.models["first"].engine.process.pid, signal.SIGKILL)

            with pytest.raises(httpx2.RemoteProtocolError):
                await read()
            assert "data: [DONE]" not in lines

    asyncio.run(test())


def test_engines_end_with_the_server(tmp_path):
    async def test():
        async with served(tmp_path, names=["first"], process=True) as found:
            process = found.fleet.models["first"].engine.process
            assert process.poll() is None
        return process

    assert asyncio.run(test()).poll() is not None


def fleet_of(tmp_path, **given) -> Fleet:
    return Fleet(lambda source, base: StubEngine(source, base, tmp_path, tmp_path, Limits(), **given))


def test_a_fleet_that_cannot_start_says_why(tmp_path):
    with pytest.raises(EngineDown):
        asyncio.run(fleet_of(tmp_path, down=True).start([stub_source("a")]))
    with pytest.raises(UserError, match="two models have this name"):
        asyncio.run(fleet_of(tmp_path).start([stub_source("a"), stub_source("a")]))


def test_a_process_that_ends_at_once_shows_its_last_lines(tmp_path, monkeypatch):
    os.chmod(tmp_path, 0o700)
    engine = ProcessEngine(stub_source("a"), "a", tmp_path, tmp_path, Limits(), seconds="not a number")
    with pytest.raises(EngineDown, match="could not convert string to float"):
        asyncio.run(engine.start())


@dataclass
class Elsewhere(StubEngine):
    """A server that runs already, and may come back with nothing of what was loaded."""

    health_seconds: ClassVar[float] = 0.02
    alive = Engine.alive
    ended = Engine.ended
    start = Engine.start
    well: bool = True

    def command(self, folder):
        return Command([], {}, self.url)

    async def _healthy(self):
        if isinstance(self.well, Exception):
            raise self.well
        self.dtype = "float32"
        return self.well


def test_a_server_elsewhere_is_proven_again_when_it_was_away(tmp_path, monkeypatch):
    monkeypatch.setattr("dstune.serve.fleet.FIRST_PAUSE", 0.01)
    os.chmod(tmp_path, 0o700)
    made: list[Elsewhere] = []
    proven: list[str] = []

    def engine(source, base):
        made.append(Elsewhere(source, base, tmp_path, tmp_path, Limits(), url="http://127.0.0.1:9"))
        return made[-1]

    async def prove(engine, name, source, base=None):
        proven.append(name)
        return Proof("proven", difference=0.0, bound=1.0)

    monkeypatch.setattr("dstune.serve.fleet.prove", prove)

    async def test():
        fleet = Fleet(engine)
        await fleet.start([stub_source("base")])
        made[0].well = UserError(Problem("stub", "refuses"))  # it answers, though it refuses
        await asyncio.sleep(0.2)
        assert fleet.ready and proven == ["base"]
        made[0].well = False
        await until(lambda: not fleet.ready)
        await asyncio.sleep(0.1)
        assert proven == ["base"] and fleet.models["base"].ready is False
        made[0].well = True
        await until(lambda: fleet.ready)
        assert proven == ["base", "base"] and fleet.restarts() == {"base": 1}
        assert made[0]._folder.parent == tmp_path
        await fleet.stop()
        assert not made[0]._folder.exists()

    asyncio.run(test())


@dataclass
class Scoring(StubEngine):
    """Tells log-probabilities: those of `scores`, by the name of the model."""

    scores: dict[str, list[float]] = field(default_factory=dict)
    loaded: list[str] = field(default_factory=list)
    seen_while_loading: list[list[str]] = field(default_factory=list)
    listed: Callable[[], list[str]] = list

    async def load_adapter(self, name, folder):
        self.loaded.append(name)

    async def unload_adapter(self, name):
        self.loaded.remove(name)

    async def prompt_ids(self, model, row):
        return row["prompt_ids"]

    async def logprobs(self, model, prompt, targets):
        self.seen_while_loading.append(self.listed())
        return self.scores[model]


def test_an_adapter_is_proven_before_it_is_listed_also_when_it_is_added_later(tmp_path):
    row = {"messages": [], "prompt_ids": [1], "target_ids": [2], "logprobs": [-1.0]}
    write_reference(tmp_path, [row])
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    adapter = lambda name: stub_source(name, folder=tmp_path, adapter=True, base="base")  # noqa: E731
    scores = {"base": [-3.0], "good": [-1.0], "zeros": [-3.0], "other": [-2.0]}
    made: list[Scoring] = []

    def engine(source, base):
        made.append(Scoring(source, base, tmp_path, tmp_path, Limits(), scores=scores))
        return made[-1]

    async def test():
        fleet = Fleet(engine)
        await fleet.start([stub_source("base")])
        made[0].listed = lambda: list(fleet.models)
        await fleet.add(adapter("good"))
        for name in ("zeros", "other"):
            with pytest.raises(Refused, match="not the model that was trained"):
                await fleet.add(adapter(name))
            assert list(fleet.models) == ["base", "good"]
        assert made[0].loaded == ["good"]  # what was refused is taken out again
        assert all("zeros" not in seen and "other" not in seen for seen in made[0].seen_while_loading)
        assert made[0].seen_while_loading[0] == ["base"]
        with pytest.raises(UserError, match="a model has this name already"):
            await fleet.add(adapter("good"))
        with pytest.raises(UserError, match="was trained on elsewhere"):
            await fleet.add(stub_source("new", folder=tmp_path, adapter=True, base="elsewhere"))
        with pytest.raises(UserError, match="a complete model"):
            await fleet.add(stub_source("new"))
        await fleet.remove("good")
        assert (list(fleet.models), made[0].loaded) == (["base"], [])
        with pytest.raises(UserError):
            await fleet.remove("base")
        await fleet.stop()

    asyncio.run(test())


def test_a_name_is_given_to_another_adapter_when_that_is_proven(tmp_path):
    for name, logprob in (("old", -1.0), ("new", -2.0), ("zeros", -3.0)):
        (tmp_path / name).mkdir()
        write_reference(
            tmp_path / name, [{"messages": [], "prompt_ids": [1], "target_ids": [2], "logprobs": [logprob]}]
        )
        (tmp_path / name / "adapter_model.safetensors").write_bytes(b"")
    adapter = lambda folder: stub_source("mine", folder=tmp_path / folder, adapter=True, base="base")  # noqa: E731
    scores, told = {"base": [-3.0], "mine": [-1.0], "mine@trial": [-2.0]}, []

    class Renaming(Scoring):
        async def load_adapter(self, name, folder):
            told.append((name, folder.name, fleet.models["mine"].source.folder.name if "mine" in fleet.models else ""))
            if (name, folder.name) == ("mine", "new") and fails:
                raise EngineDown("it went away")
            await super().load_adapter(name, folder)

    fleet = Fleet(lambda source, base: Renaming(source, base, tmp_path, tmp_path, Limits(), scores=scores))
    fails: list[bool] = []

    async def test():
        await fleet.start([stub_source("base"), adapter("old")])
        created = fleet.models["mine"].created
        with pytest.raises(UserError, match="is not the name of a served adapter"):
            await fleet.replace(stub_source("other", folder=tmp_path / "new", adapter=True, base="base"))
        with pytest.raises(Refused, match="not the model that was trained"):
            await fleet.replace(adapter("zeros"))
        assert fleet.models["mine"].source.folder.name == "old" and fleet.models["mine"].ready
        assert all(name != "mine" for name, folder, _ in told if folder == "zeros"), "it was tried by another name"
        fails.append(True)
        with pytest.raises(EngineDown):
            await fleet.replace(adapter("new"))
        assert told[-1][:2] == ("mine", "old"), "the one before is there again"
        fails.clear()
        model = await fleet.replace(adapter("new"))
        assert fleet.models["mine"] is model and model.source.folder.name == "new" and model.created == created
        assert told[-1] == ("mine", "new", "old"), "the one before is listed until then"
        await asyncio.wait_for(fleet.wait_until_replaced("mine"), 1)
        await fleet.stop()

    asyncio.run(test())


def test_the_gateway_answers_while_its_models_are_loaded(tmp_path):
    os.chmod(tmp_path, 0o700)
    gate = asyncio.Event()

    async def test():
        async with listening(StubApp(0.0)) as engine_url:

            class Slow(StubEngine):
                async def start(self):
                    await gate.wait()
                    await super().start()

            fleet = Fleet(lambda source, base: Slow(source, base, tmp_path, tmp_path, Limits(), url=engine_url))
            database = Database.open_folder(tmp_path)
            gateway = Gateway(fleet, database, Settings(), Recorder(database), ROUTES)
            key, other = gateway.keys.add("one"), gateway.keys.add("two", models=["second"])
            starting = asyncio.create_task(fleet.start([stub_source("first")]))
            async with listening(gateway) as url, httpx2.AsyncClient(base_url=url, trust_env=False) as client:

                async def ask(path, body=None, key=key):
                    headers = {"authorization": f"Bearer {key}"}
                    answer = await client.request("POST" if body else "GET", path, json=body, headers=headers)
                    return answer.status_code, (answer.json().get("error") or {}).get("code"), answer

                assert (await ask("/healthz"))[0] == 200 and (await ask("/readyz"))[0] == 503
                assert (await ask("/v1/models"))[2].json()["data"] == []
                for _ in range(2):
                    status, code, answer = await ask("/v1/chat/completions", chat())
                    assert (status, code, answer.headers["retry-after"]) == (503, "starting", "5")
                assert (await ask("/v1/chat/completions", chat(model="none")))[:2] == (404, "model_not_found")
                assert (await ask("/v1/chat/completions", chat(), other))[:2] == (404, "model_not_found")
                with pytest.raises(EngineDown, match="being started"):
                    await fleet.add(stub_source("new", folder=tmp_path, adapter=True))
                gate.set()
                await starting
                assert (await ask("/readyz"))[0] == 200
                assert (await ask("/v1/chat/completions", chat()))[0] == 200
            await fleet.stop()
            database.close()

    asyncio.run(test())


def test_adapters_stay_as_they_are_while_they_are_loaded(tmp_path):
    """Who removes or replaces one of them then is told to come later."""
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    gate, loading = asyncio.Event(), asyncio.Event()

    class Slow(StubEngine):
        async def load_adapter(self, name, folder):
            loading.set()
            await gate.wait()

    async def test():
        fleet = Fleet(lambda source, base: Slow(source, base, tmp_path, tmp_path, Limits()))
        adapters = [stub_source(name, folder=tmp_path, adapter=True, base="base") for name in ("a1", "a2")]
        starting = asyncio.create_task(fleet.start(adapters))
        await loading.wait()
        for change in (fleet.remove("a1"), fleet.remove("a2"), fleet.replace(adapters[1])):
            with pytest.raises(EngineDown, match="being started"):
                await change
        gate.set()
        await starting
        assert {"a1", "a2"} < set(fleet.models)
        await fleet.remove("a1")
        assert "a1" not in fleet.models
        await fleet.stop()

    asyncio.run(test())


def test_two_who_add_or_remove_one_name_at_once(tmp_path):
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    gate = asyncio.Event()

    class Slow(StubEngine):
        async def load_adapter(self, name, folder):
            await gate.wait()

    async def test():
        fleet = Fleet(lambda source, base: Slow(source, base, tmp_path, tmp_path, Limits()))
        await fleet.start([stub_source("one"), stub_source("other")])
        both = [stub_source("name", folder=tmp_path, adapter=True, base=base) for base in ("one", "other")]
        adding = [asyncio.create_task(fleet.add(source)) for source in both]
        await asyncio.sleep(0.05)
        gate.set()
        first, second = await asyncio.gather(*adding, return_exceptions=True)
        assert first.source is both[0] and isinstance(second, UserError)
        removed = await asyncio.gather(*(fleet.remove("name") for _ in range(2)), return_exceptions=True)
        assert removed[0] is None and isinstance(removed[1], UserError)
        assert list(fleet.models) == ["one", "other"]
        await fleet.stop()

    asyncio.run(test())


def test_a_name_of_a_base_needs_an_adapter(tmp_path):
    fleet = Fleet(lambda source, base: pytest.fail("an engine is made"), base_name="base")
    with pytest.raises(UserError, match="--base-name"):
        asyncio.run(fleet.start([stub_source("whole")]))
