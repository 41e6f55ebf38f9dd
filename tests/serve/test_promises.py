"""What docs/serving.md promises where something goes wrong: writes that fail, adapters that changed, engines left alone."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from unittest.mock import MagicMock

import psutil
import pytest

from dstune.core.errors import Problem, UserError
from dstune.serve.engines import control_strings, special
from dstune.serve.engines.base import Command, EngineDown, EngineFault, Limits
from dstune.serve.engines.llama_cpp import LlamaCppEngine
from dstune.serve.engines.vllm import VllmEngine
from dstune.serve.errors import ApiError
from dstune.serve.fleet import Fleet
from dstune.serve.gateway import admission, recording, request_log
from dstune.serve.gateway.inference import UsageRemover
from dstune.serve.gateway.recording import Record, Recorder
from dstune.serve.gateway.request_log import RequestLog
from dstune.serve.gateway.routes import ROUTES
from dstune.serve.store.database import Database, now
from dstune.serve.store.keys import Keys, Limit
from dstune.serve.store.tables import AnswerRow
from dstune.testing.tiny import CHATML
from tests.support.serving import ProcessEngine, StubEngine, chat, served, stub_source, until
from tests.support.tiny import save_tokenizer

# -- control tokens, number formats -----------------------------------------------------------------------------------

PRINTED = CHATML.replace("message['content']", "('<turn>' if message['role'] == 'user' else '') + message['content']")


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    """The hub's cache with the model `me/mine`, whose template prints a token that is not marked as special."""
    root = tmp_path / "hub" / "models--me--mine"
    folder = root / "snapshots" / "abc"
    folder.mkdir(parents=True)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text("abc")
    save_tokenizer(folder)
    file = folder / "tokenizer.json"
    found = json.loads(file.read_text())
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    for number, content in enumerate(("<turn>", "<think>", "</think>", "<never>"), 200):
        found["added_tokens"].append({"id": number, "content": content, **plain})
    file.write_text(json.dumps(found))
    (folder / "chat_template.jinja").write_text(PRINTED)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "dtype": "float16"}))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))

    def run(words, *, input, **given):  # in this process, which has transformers already
        told = json.loads(input)
        try:
            told = control_strings.pattern_of(Path(told["folder"]), trust_remote_code=told["trust_remote_code"])
        except Exception as error:
            told = {"error": str(error)}
        return subprocess.CompletedProcess(words, 0, json.dumps(told) + "\n")

    monkeypatch.setattr(special.subprocess, "run", run)
    return folder


def test_a_model_of_the_hub_has_its_control_tokens_and_number_format(hub, tmp_path):
    """Also tokens that are not marked as special, where the template prints them; tags that an answer may hold are text."""
    engine = VllmEngine(stub_source("mine", path="me/mine", base="me/mine"), "mine", tmp_path, tmp_path, Limits())
    engine.learn()
    assert engine.dtype == "float16"
    for body in (
        {"messages": [{"role": "user", "content": "a<|im_end|>b"}]},
        {"messages": [{"role": "user", "content": "a<turn>b"}]},
        {"messages": [], "chat_template_kwargs": {"language": "<|im_start|>"}},
    ):
        with pytest.raises(ApiError) as caught:
            engine.outgoing("/v1/chat/completions", body)
        assert (caught.value.status, caught.value.code) == (400, "control_token")
    fine = {"messages": [{"role": "user", "content": "<think> <never>"}]}
    assert engine.outgoing("/v1/chat/completions", fine) == fine
    thought = {"role": "assistant", "content": "Yes", "reasoning_content": "Hm."}
    (sent,) = engine.outgoing("/v1/chat/completions", {**fine, "messages": [thought]})["messages"]
    assert sent == {**thought, "reasoning": "Hm."}  # vLLM ignores reasoning_content


def test_an_engine_that_parses_text_does_not_start_without_a_tokenizer(hub, tmp_path):
    unknown = stub_source("other", path="me/other", base="me/other")
    for engine in (
        VllmEngine(unknown, "other", tmp_path, tmp_path, Limits(), number_format="bfloat16"),
        LlamaCppEngine(unknown, "other", tmp_path, tmp_path, Limits()),
    ):
        with pytest.raises(UserError, match="hf download me/other"):
            engine.learn()
    with pytest.raises(UserError, match="--dtype"):
        VllmEngine(unknown, "other", tmp_path, tmp_path, Limits()).learn()
    (hub / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        VllmEngine(stub_source("mine", path="me/mine", base="me/mine"), "m", tmp_path, tmp_path, Limits()).learn()


class Unlearned(ProcessEngine):
    def learn(self) -> None:
        raise UserError(Problem("MODEL", "is not known"))


def test_an_engine_of_which_too_little_is_known_is_stopped(tmp_path):
    os.chmod(tmp_path, 0o700)
    engine = Unlearned(stub_source("a"), "a", tmp_path, tmp_path, Limits(start_seconds=60))
    with pytest.raises(UserError):
        asyncio.run(engine.start())
    assert engine.process is None


# -- the log of requests ----------------------------------------------------------------------------------------------


def masked(text: str) -> str:
    return re.sub(r"\S+@\S+", "<EMAIL>", text)


def row(user: str | None, number: int = 0) -> dict:
    names = {"id": f"req_{number}", "response": None, "created": now(), "key": "k", "model": "m", "version": "v"}
    return {**names, "user": user, "status": 200}


def users(folder: Path) -> list[str]:
    import pyarrow.parquet as pq

    return sorted(one["id"] for file in folder.glob("*.parquet") for one in pq.read_table(file).to_pylist())


def test_a_user_whose_name_is_masked_is_forgotten(tmp_path):
    log = RequestLog(tmp_path, masked)
    for number, user in enumerate(("alice@example.com", "bob@example.com", None)):
        log.add(row(user, number), "/v1", {"user": user}, b"{}")
    log.flush(now=True)
    (file,) = tmp_path.glob("*.parquet")
    assert b"alice" not in file.read_bytes()
    old = time.time() - 5 * 86400
    os.utime(file, (old, old))
    assert RequestLog(tmp_path, masked).forget("alice@example.com") == 1  # by another server, after a restart
    assert users(tmp_path) == ["req_1", "req_2"]
    (file,) = tmp_path.glob("*.parquet")
    assert file.stat().st_mtime == pytest.approx(old)  # the others are removed when they would have been
    assert (tmp_path / "user-key").stat().st_mode & 0o777 == 0o600
    RequestLog(tmp_path, masked, retention_days=4).flush(now=True)
    assert users(tmp_path) == []


def test_what_is_being_written_is_forgotten_too(tmp_path, monkeypatch):
    writing, go_on = threading.Event(), threading.Event()

    def slow(text: str) -> str:
        writing.set()
        assert go_on.wait(30)
        return text

    log = RequestLog(tmp_path, slow)
    log.add(row("alice"), "/v1", {"a": "text"}, b"{}")
    flushing = threading.Thread(target=lambda: log.flush(now=True))
    flushing.start()
    assert writing.wait(30)
    removed: list[int] = []
    forgetting = threading.Thread(target=lambda: removed.append(log.forget("alice")))
    forgetting.start()
    forgetting.join(0.2)
    go_on.set()
    flushing.join(30)
    forgetting.join(30)
    assert (removed, users(tmp_path)) == ([1], [])


def test_requests_whose_write_fails_are_written_later(tmp_path, monkeypatch, caplog):
    def redact(text: str) -> str:
        if text == "no":
            raise ValueError("this cannot be masked")
        return text

    log = RequestLog(tmp_path, redact)
    monkeypatch.setattr(request_log, "MOST_ROWS", 3)
    write = RequestLog._write
    monkeypatch.setattr(RequestLog, "_write", MagicMock(side_effect=OSError("no space left")))
    for number in range(5):
        log.add(row("a", number), "/v1", {}, b"{}")
    with pytest.raises(OSError, match="no space"):
        log.flush(now=True)
    assert "2 requests are not logged" in caplog.text
    monkeypatch.setattr(RequestLog, "_write", write)
    log.add(row("a", 5), "/v1", {}, b'"no"')
    log.close()
    assert users(tmp_path) == ["req_2", "req_3", "req_4"]


def test_large_requests_do_not_pile_up_in_memory(tmp_path, monkeypatch, caplog):
    """A file is written before it has its rows; where none can be, the oldest are given up."""
    log = RequestLog(tmp_path, str)
    monkeypatch.setattr(request_log, "BYTES", 3000)
    monkeypatch.setattr(request_log, "MOST_BYTES", 5000)
    for number in range(3):
        log.flush()
        assert users(tmp_path) == []
        log.add(row("a", number), "/v1", {}, b"", 1000)
    log.flush()
    assert users(tmp_path) == ["req_0", "req_1", "req_2"]
    write = RequestLog._write
    monkeypatch.setattr(RequestLog, "_write", MagicMock(side_effect=OSError("no space left")))
    for number in range(3, 8):
        log.add(row("a", number), "/v1", {}, b"", 1000)
    with pytest.raises(OSError, match="no space"):
        log.flush()
    for number in range(8, 10):
        log.add(row("a", number), "/v1", {}, b"", 1000)
    assert caplog.text.count("1 requests are not logged") == 2
    monkeypatch.setattr(RequestLog, "_write", write)
    log.close()
    assert users(tmp_path) == [f"req_{number}" for number in (0, 1, 2, 5, 6, 7, 8, 9)]


# -- the records of answers -------------------------------------------------------------------------------------------


def recorder_of(folder: Path) -> tuple[Recorder, str]:
    database = Database.open_folder(folder)
    keys = Keys(database)
    return Recorder(database), keys.find(keys.add("one")).id


def answer_row(key: str, number: int) -> dict:
    names = {"id": f"req_{number}", "response": None, "key": key, "model": "m", "version": "v", "user": None}
    return {**names, "status": 200, "tokens": 1, "input_tokens": 0, "seconds": 0.1, "created": now()}


def recorded(recorder: Recorder) -> list[str]:
    with recorder._database.session() as session:
        return sorted(one.id for one in session.query(AnswerRow))


def test_records_whose_write_fails_are_written_later(tmp_path, monkeypatch):
    recorder, key = recorder_of(tmp_path)
    monkeypatch.setattr(recording, "MOST_ROWS", 2)
    write = recorder._write
    recorder._write = MagicMock(side_effect=OSError("no space left"))
    recorder._rows = [answer_row(key, number) for number in range(3)]
    with pytest.raises(OSError, match="no space"):
        asyncio.run(recorder.flush())
    recorder._write = write
    asyncio.run(recorder.flush())
    assert recorded(recorder) == ["req_1", "req_2"]


def test_who_asked_most_is_forgotten_too(tmp_path):
    """A statement may name 32,766 rows."""
    recorder, key = recorder_of(tmp_path)
    recorder._rows = [answer_row(key, number) | {"user": "u" if number else "v"} for number in range(33_000)]
    assert asyncio.run(recorder.forget("u")) == 32_999
    assert recorded(recorder) == ["req_0"]


def test_a_record_that_the_tables_refuse_does_not_hold_up_the_others(tmp_path):
    recorder, key = recorder_of(tmp_path)
    recorder._rows = [answer_row("nobody" if number == 1 else key, number) for number in range(3)]
    asyncio.run(recorder.flush())
    assert recorded(recorder) == ["req_0", "req_2"]


def test_tokens_are_read_wherever_a_chunk_is_cut():
    text = b'data: {"id":"a"}\n\ndata: {"usage":{"prompt_tokens": 17,"completion_tokens":4,"total_tokens": 1234}}\n\n'
    for cut in range(1, len(text)):
        record = Record(keeps_text=False)
        for chunk in (text[:cut], text[cut:]):
            record.take(chunk)
        assert (record.tokens, record.input_tokens, record.events) == (1234, 17, 2), text[:cut]


def test_a_stream_is_shown_as_it_comes_without_the_usage_nobody_asked_for():
    events = [b'data: {"choices":[{"a":"\\"choices\\":[]"}],"usage":null}\n\n', b'data: {"choices": []}\r\n\r\n']
    usage = b'data: {"choices": [ ],"usage":{"total_tokens":3}}\n\n'
    text = b"".join([*events, usage, b"data: [DONE]\n\n"])
    for cut in range(len(text)):
        filtered = UsageRemover()
        shown = filtered.take(text[:cut]) + filtered.take(text[cut:]) + filtered.unfinished_event
        assert shown == text.replace(usage, b"")
    filtered = UsageRemover()
    assert filtered.take(events[0]) == events[0]
    assert filtered.take(b"data: {") + filtered.unfinished_event == b"data: {"  # a stream that was cut


def test_a_stream_is_charged_as_its_engine_counts(tmp_path):
    async def main():
        async with served(tmp_path) as found:
            client = found.client()
            plain = await client.post("/v1/chat/completions", json=chat("a b c", stream=True))
            asked = await client.post(
                "/v1/chat/completions", json=chat("a b c", stream=True, stream_options={"include_usage": True})
            )
            assert all(body["stream_options"] == {"include_usage": True} for _, body in found.app.seen)
            while found.gateway.open:
                await asyncio.sleep(0.01)
            await found.gateway.recorder.flush()
            with found.gateway.database.session() as session:
                tokens = [(row.tokens, row.input_tokens) for row in session.query(AnswerRow)]
        return plain.text, asked.text, tokens

    plain, asked, tokens = asyncio.run(main())
    assert "total_tokens" not in plain and plain.endswith("data: [DONE]\n\n")
    assert asked.count("total_tokens") == 1
    assert tokens == [(4, 1), (4, 1)]


def test_the_tokens_of_a_day_survive_a_restart(tmp_path, monkeypatch):
    async def main():
        (tmp_path / "state").mkdir(mode=0o700)
        async with served(tmp_path / "state") as found:
            key = found.gateway.keys.add("small", limit=Limit(tokens_per_day=4))
            client = found.client(key)
            assert (await client.post("/v1/chat/completions", json=chat("one two three"))).status_code == 200
            while found.gateway.open:
                await asyncio.sleep(0.01)
            await found.gateway.recorder.flush()
            # As another gateway of this database, or this one after a restart, sees it.
            used = Recorder(found.gateway.database).used
            other = admission.Admission(found.gateway.settings, found.gateway.metrics, used)
            caller = found.gateway.keys.find(key)
            with pytest.raises(ApiError) as caught:
                await other.check_rate(caller)
            assert caught.value.status == 429
            monkeypatch.setattr(admission.time, "time", lambda: (time.time_ns() / 1e9) + admission.DAY)
            await other.check_rate(caller)  # tomorrow
            other.charge(caller, 4)  # the guard's windows, which are no answers
            monkeypatch.setattr(admission, "USAGE_CACHE_SECONDS", -1.0)
            with pytest.raises(ApiError):
                await other.check_rate(caller)

    asyncio.run(main())


# -- engines ----------------------------------------------------------------------------------------------------------


class Fragile(StubEngine):
    """Ends when it is told to; does not take the adapters in `bad`."""

    ended_once = False
    bad: tuple[str, ...] = ()
    away: int = 0
    """How often it does not answer when an adapter is loaded."""
    broken = False
    unloaded: tuple[str, ...] = ()

    def alive(self) -> bool:
        return not self.ended_once

    async def start(self) -> None:
        await super().start()
        self.ended_once = False
        if self.broken:
            self.broken = False
            self.ended_once = True
            raise RuntimeError("a fault of ours")

    async def load_adapter(self, name, folder):
        if self.away:
            self.away -= 1
            raise EngineDown("answers with 502")
        if name in self.bad:
            raise EngineFault("answers with 500")

    async def unload_adapter(self, name):
        self.unloaded += (name,)


def test_an_adapter_that_is_refused_after_a_restart_stays_out_alone(tmp_path, monkeypatch):
    monkeypatch.setattr("dstune.serve.fleet.FIRST_PAUSE", 0.01)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    adapter = lambda name: stub_source(name, folder=tmp_path, adapter=True, base="base")  # noqa: E731
    made: list[Fragile] = []

    def engine(source, base):
        made.append(Fragile(source, base, tmp_path, tmp_path, Limits(), url="http://127.0.0.1:9"))
        return made[-1]

    async def main():
        fleet = Fleet(engine)
        await fleet.start([stub_source("base"), adapter("good"), adapter("bad")])
        (own,) = made
        own.bad, own.ended_once = ("bad",), True
        await until(lambda: own.starts == 2 and fleet.models["good"].ready)
        await until(lambda: fleet.models["bad"].failed)
        assert fleet.ready and not fleet.models["bad"].ready
        assert "500" in fleet.models["bad"].failed
        await asyncio.sleep(0.1)
        assert own.starts == 2  # the engine was kept
        own.bad = ()
        await fleet.add(adapter("bad"))
        assert fleet.models["bad"].ready
        with pytest.raises(UserError, match="a model has this name already"):
            await fleet.add(adapter("bad"))
        own.bad, own.ended_once = ("bad",), True
        await until(lambda: fleet.models["bad"].failed)
        await fleet.remove("bad")
        assert "bad" not in fleet.models and not own.unloaded
        await fleet.stop()

    asyncio.run(main())


def test_an_adapter_is_loaded_again_when_a_server_elsewhere_did_not_answer(tmp_path, monkeypatch):
    """One 502 of a balancer in front of it is no refusal."""
    monkeypatch.setattr("dstune.serve.fleet.FIRST_PAUSE", 0.01)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    adapter = stub_source("mine", folder=tmp_path, adapter=True, base="base")

    async def main():
        fleet = Fleet(
            lambda source, base: Fragile(source, base, tmp_path, tmp_path, Limits(), url="http://127.0.0.1:9")
        )
        await fleet.start([stub_source("base"), adapter])
        engine = fleet.models["mine"].engine
        engine.away, engine.ended_once = 1, True
        await until(lambda: engine.starts >= 2 and not engine.away)
        await asyncio.sleep(0.1)
        assert not fleet.models["mine"].failed
        engine.ended_once = True  # as a server that is stopped is silent
        await until(lambda: fleet.models["mine"].ready)
        assert fleet.ready and not fleet.models["mine"].failed
        await fleet.stop()

    asyncio.run(main())


def test_a_fault_of_the_gateway_does_not_end_its_watch(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("dstune.serve.fleet.FIRST_PAUSE", 0.01)

    async def main():
        fleet = Fleet(
            lambda source, base: Fragile(source, base, tmp_path, tmp_path, Limits(), url="http://127.0.0.1:9")
        )
        await fleet.start([stub_source("base")])
        engine = fleet.models["base"].engine
        engine.broken = engine.ended_once = True
        await until(lambda: engine.starts == 3 and fleet.ready)
        await fleet.stop()

    with caplog.at_level(logging.ERROR, "dstune.serve"):
        asyncio.run(main())
    assert "a fault of ours" in caplog.text


class Sleeping(StubEngine):
    starts_process = True


def test_an_engine_does_not_outlive_its_gateway(tmp_path):
    """Its program takes no notice of standard input; the pipe closes however the gateway ends."""
    os.chmod(tmp_path, 0o700)
    engine = Sleeping(stub_source("a"), "a", tmp_path, tmp_path, Limits())
    words = ["sh", "-c", f"echo $$ > {tmp_path}/pid.new; mv {tmp_path}/pid.new {tmp_path}/pid; exec sleep 600"]
    engine._spawn(Command(words, os.environ, ""))
    asyncio.run(until((tmp_path / "pid").is_file))
    own = int((tmp_path / "pid").read_text())
    os.kill(own, 0)
    engine.process.stdin.close()
    try:
        assert engine.process.wait(30) != 0
        asyncio.run(until(lambda: not psutil.pid_exists(own)))
    finally:
        asyncio.run(engine.stop(0))


@pytest.mark.parametrize(("words", "code"), [(["sh", "-c", "exit 3"], 3), (["sh", "-c", "kill -9 $$"], 137)])
def test_the_guard_tells_how_its_program_ended(words, code):
    guard = Path(special.__file__).with_name("guard.py")
    with subprocess.Popen([sys.executable, "-I", guard, *words], stdin=subprocess.PIPE) as started:
        assert started.wait(60) == code  # before standard input closes


def test_the_guard_kills_no_group_but_its_own(tmp_path):
    """Started within the group of another process, which goes on."""
    guard = Path(special.__file__).with_name("guard.py")
    script = f"{sys.executable} -I {guard} sleep 60 < /dev/null; echo $? > {tmp_path}/code; sleep 60"
    with subprocess.Popen(["sh", "-c", script], start_new_session=True) as shell:
        try:
            asyncio.run(until((tmp_path / "code").is_file))
            time.sleep(0.5)
            assert shell.poll() is None
        finally:
            os.killpg(shell.pid, signal.SIGKILL)


# -- pages of other sites, routes -------------------------------------------------------------------------------------


def test_pages_of_allowed_sites_may_ask_from_a_browser(tmp_path):
    site = "https://app.example"

    async def main():
        async with served(tmp_path, origins=frozenset({site})) as found:
            client, path = found.client(), "/v1/chat/completions"
            asks = {
                "access-control-request-method": "POST",
                "access-control-request-headers": "authorization, x-stainless-os",
            }
            allowed = await client.options(path, headers={"origin": site, **asks})
            assert allowed.status_code == 204 and not allowed.content
            assert allowed.headers["access-control-allow-origin"] == site
            assert allowed.headers["access-control-allow-methods"] == "POST"
            assert allowed.headers["access-control-allow-headers"] == "authorization, x-stainless-os"
            assert allowed.headers["vary"] == "origin"
            other = await client.options(path, headers={"origin": "https://evil.example", **asks})
            assert other.status_code == 403
            cross = {"origin": site, "sec-fetch-site": "cross-site"}
            for body, status in ((chat(), 200), (chat(stream=True), 200), (chat(n=0), 400)):
                answer = await client.post(path, json=body, headers=cross)
                assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (status, site)
                assert "x-request-id" in answer.headers["access-control-expose-headers"]
            foreign = await client.post(path, json=chat(), headers={"origin": "https://evil.example"})
            for answer in (other, foreign, await client.post(path, json=chat())):
                assert not [name for name in answer.headers if name.startswith("access-control")]

    asyncio.run(main())


def test_every_route_is_in_the_documentation():
    text = (Path(__file__).parents[2] / "docs" / "serving.md").read_text()
    named = set(re.findall(r"/[\w/.-]*[\w]", text)) | {"/"}
    for route in ROUTES:
        path = route.path.partition("{")[0].rstrip("/") or "/"
        assert any(one == path or one.startswith(f"{path}/") for one in named), route.path
    assert "finetuning-jobs.md" in text
