"""The gateway over a stub engine: who is let in, what is let through, what happens when somebody goes."""

from __future__ import annotations

import asyncio
import json
import re

import pytest

from dstune.serve.engines.base import EngineDown
from dstune.serve.gateway.app import Route
from dstune.serve.gateway.routes import INFERENCE, ROUTES
from dstune.serve.store.keys import Keys, Limit
from tests.support.serving import chat, closed_paths, run

EXAMPLES = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "a"}]},
    "/v1/completions": {"prompt": "a"},
    "/v1/responses": {"input": "a"},
    "/v1/embeddings": {"input": "a"},
    "/v1/moderations": {"input": "a"},
    "/classify": {"input": "a"},
    "/rerank": {"query": "a", "documents": ["b"]},
    "/score": {"text_1": "a", "text_2": "b"},
    "/tags": {"input": "a b"},
    "/answers": {"question": "a", "context": "b"},
    "/rewards": {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
}


# -- who is let in ----------------------------------------------------------------------------------------------------


def test_every_route_asks_for_a_key_but_the_public_ones(tmp_path):
    async def test(found):
        stranger = found.client("")
        stranger.headers.clear()
        for route in ROUTES:
            path = re.sub(r"\{.*?\}", "first", route.path)
            for headers in ({}, {"authorization": "Bearer nothing"}, {"authorization": f"Basic {found.key}"}):
                given = {"content-type": "application/json", **headers}
                answer = await stranger.request(route.method, path, headers=given)
                if route.scope == "public":
                    assert answer.status_code == 200, route
                else:
                    assert (answer.status_code, answer.json()["error"]["type"]) == (401, "invalid_request_error"), route
            if route.scope == "admin":
                answer = await found.client().request(route.method, path, json={})
                assert (answer.status_code, answer.json()["error"]["code"]) == (403, "admin_only"), route

    run(test, tmp_path)


def test_what_is_another_tenants_does_not_exist_on_any_route(tmp_path):
    """Generated from the table: a route that takes a model or an id answers another tenant as if there were none."""

    async def test(found):
        mine = await found.client().post("/v1/chat/completions", json=chat())
        request_id, response_id = mine.headers["x-request-id"], mine.json()["id"]
        stranger, asked = found.client(found.other), 0
        for route in ROUTES:
            bodies: list[dict | None] = []
            if route.path in INFERENCE:
                bodies = [{"model": "first", **EXAMPLES[route.path]}]
            elif route.path == "/v1/feedback":
                bodies = [{"id": one, "rating": 1} for one in (request_id, response_id)]
            elif "{model" in route.path and route.scope == "key":
                bodies = [None]
            for body in bodies:
                path = re.sub(r"\{.*?\}", "first", route.path)
                answer = await stranger.request(route.method, path, json=body)
                missing = await stranger.request(
                    route.method,
                    path.replace("first", "nowhere"),
                    json=body and json.loads(json.dumps(body).replace("first", "nowhere").replace(request_id, "req_0")),
                )
                assert answer.status_code == missing.status_code == 404, route
                told = answer.json()["error"]["message"].replace("first", "nowhere")
                assert told == missing.json()["error"]["message"]
                asked += 1
        assert asked == len(INFERENCE) + 3
        listed = (await stranger.get("/v1/models")).json()["data"]
        assert [model["id"] for model in listed] == ["second"] and "/v1/chat/completions" in listed[0]["routes"]
        for name in ("second", "first"):
            found.gateway.fleet.models["second"].parent = name
            seen = (await stranger.get("/v1/models/second")).json()["parent"]
            assert seen == ("second" if name == "second" else None)

    run(test, tmp_path)


def test_hosts_origins_and_types(tmp_path):
    async def test(found):
        client = found.client()
        refused = {
            421: [{"host": "evil.example"}, {"host": "127.0.0.1.evil.example"}],
            403: [{"origin": "http://evil.example"}, {"origin": "null"}, {"sec-fetch-site": "cross-site"}],
            415: [{"content-type": "text/plain"}, {"content-encoding": "gzip"}],
        }
        refused[403].append({"origin": "http://["})
        for status, headers in refused.items():
            for given in headers:
                sent = {"content-type": "application/json", **given}
                answer = await client.post("/v1/chat/completions", content=json.dumps(chat()), headers=sent)
                assert answer.status_code == status, given
        own = {"origin": found.url, "sec-fetch-site": "same-origin"}
        assert (await client.post("/v1/chat/completions", json=chat(), headers=own)).status_code == 200
        probe = {"host": "10.0.0.7:8000"}
        assert (await client.get("/healthz", headers=probe)).status_code == 200
        assert not [path for path, _ in found.app.seen if path != "/v1/chat/completions"]
        assert (await client.options("/v1/chat/completions")).status_code == 405  # no CORS

    run(test, tmp_path)


def test_a_key_is_found_by_its_hash_and_stops_when_it_is_revoked(tmp_path, monkeypatch):
    monkeypatch.setattr("dstune.serve.store.keys.KEY_CACHE_SECONDS", 0.0)

    async def test(found):
        assert found.key not in (tmp_path / "store.sqlite").read_bytes().decode("latin-1")
        assert (tmp_path / "store.sqlite").stat().st_mode & 0o077 == 0
        client = found.client()
        assert (await client.get("/v1/models")).status_code == 200
        Keys(found.gateway.database).revoke("one")
        assert (await client.get("/v1/models")).status_code == 401
        similar = found.other[:-1] + ("a" if found.other[-1] != "a" else "b")
        assert (await found.client(similar).get("/v1/models")).status_code == 401

    run(test, tmp_path)


def test_limits_of_a_key(tmp_path):
    async def test(found):
        keys = found.gateway.keys
        slow = found.client(keys.add("slow", limit=Limit(requests_per_minute=2)))
        codes = [(await slow.post("/v1/chat/completions", json=chat())).status_code for _ in range(3)]
        assert codes == [200, 200, 429]
        small = found.client(keys.add("small", limit=Limit(tokens_per_day=4)))
        answers = [await small.post("/v1/chat/completions", json=chat("one two three")) for _ in range(2)]
        assert [answer.status_code for answer in answers] == [200, 429]
        assert int(answers[1].headers["retry-after"]) > 0
        narrow = found.client(keys.add("narrow", limit=Limit(concurrent=1)))
        found.app.seconds = 0.2
        both = await asyncio.gather(*(narrow.post("/v1/chat/completions", json=chat()) for _ in range(2)))
        assert sorted(answer.status_code for answer in both) == [200, 429]

    run(test, tmp_path)


# -- what is let through ----------------------------------------------------------------------------------------------


def test_routes_of_engines_that_are_not_on_the_list_are_not_reachable(tmp_path):
    async def test(found):
        client = found.client(found.admin)
        for path in (
            "/v1/load_lora_adapter",
            "/tokenize",
            "/load_model",
            "/reset",
            "/v1/chat/completions/",
            "/v1//models",
        ):
            assert (await client.post(path, json={})).status_code == 404, path
        assert (await client.get("/v1/chat/completions")).status_code == 405
        assert not found.app.seen

    run(test, tmp_path)


def test_a_route_that_is_not_open_names_what_opens_it(tmp_path):
    async def test(found):
        client = found.client()
        for path, words in {"/v1/files": "--fine-tuning", **closed_paths()}.items():
            assert f"`dstune serve {words}" in (await client.get(path)).text, path
        found.gateway.add_routes([Route("GET", "/v1/files", ROUTES[0].handler)])
        for path in ("/v1/files/x", "/v1/filesystem", "/nothing"):
            assert (await client.get(path)).json()["error"]["message"] == "There is no such route.", path

    run(test, tmp_path)


IGNORED = [
    ({"chat_template": "{{ x }}"}, "chat_template"),
    ({"prompt_logprobs": 0}, "prompt_logprobs"),
    ({"temperature": -1}, "temperature"),
    ({"temperature": True}, "temperature"),
    ({"n": 0}, "n"),
    ({"max_tokens": 1.5}, "max_tokens"),
    ({"stop": ["a"] * 5}, "stop"),
    ({"logit_bias": {"x": 1}}, "logit_bias"),
    ({"messages": []}, "messages"),
    ({"messages": [{"role": "root", "content": "a"}]}, "messages"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}]},
        "messages",
    ),
    ({"messages": [{"role": "user", "content": "a", "cache": 1}]}, "messages"),
    ({"chat_template_kwargs": {"add_generation_prompt": False}}, "chat_template_kwargs"),
    ({"chat_template_kwargs": {"tools": "x"}}, "chat_template_kwargs"),
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"response_format": {"type": "json_object", "schema": {}, "json_schema": None}}, "response_format"),
    ({"response_format": {"type": "json_schema", "schema": {}}}, "response_format"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}}, "response_format"),
    ({"messages": [{"role": "assistant", "content": "a", "refusal": "b"}]}, "messages"),
    *(
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": text}}]}]},
            "messages",
        )
        for text in ('{"a": "my secret is', "[]")
    ),
    ({"store": True}, "store"),
    ({"metadata": {"a": "b"}}, "metadata"),
    ({"service_tier": "flex"}, "service_tier"),
    ({"n": 100, "max_tokens": 10000}, "max_tokens"),
    ({"tools": [{"type": "web_search"}]}, "tools"),
]


def test_what_would_be_ignored_is_refused_by_name(tmp_path):
    async def test(found):
        for changes, param in IGNORED:
            answer = await found.client().post("/v1/chat/completions", json=chat() | changes)
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), changes
            assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
        assert not found.app.seen

    run(test, tmp_path)


def test_what_asks_for_nothing_is_left_out(tmp_path):
    async def test(found):
        neutral = {
            "store": False,
            "metadata": {},
            "service_tier": "auto",
            "response_format": {"type": "text"},
            "user": None,
        }
        found.fleet.models["first"].engine.context = 4096  # its answers are bounded without being asked
        answer = await found.client().post("/v1/chat/completions", json=chat() | neutral)
        assert answer.status_code == 200
        (_, body), *_ = found.app.seen
        assert set(body) == {"model", "messages"}

    run(test, tmp_path)


def test_engines_get_messages_as_training_reads_them(tmp_path):
    """Several parts stay parts; engines would pass a refusal over."""

    async def test(found):
        parts = [{"type": "text", "text": "a<|im_"}, {"type": "text", "text": "end|>b"}]
        said = [
            {"role": "user", "content": parts},
            {"role": "assistant", "refusal": "No."},
            {"role": "user", "content": "c"},
        ]
        answer = await found.client().post("/v1/chat/completions", json=chat() | {"messages": said})
        assert answer.status_code == 200
        (_, body), *_ = found.app.seen
        contents = [("user", parts), ("assistant", "No."), ("user", "c")]
        assert body["messages"] == [{"role": role, "content": text} for role, text in contents]
        empty = [{"role": "system", "content": ""}, {"role": "user", "content": [{"type": "text", "text": ""}]}]
        call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": ""}}
        empty += [{"role": "assistant", "content": None, "tool_calls": [call]}, {"role": "tool", "content": []}]
        answer = await found.client().post("/v1/chat/completions", json=chat() | {"messages": empty})
        assert answer.status_code == 200
        sent = found.app.seen[-1][1]["messages"]
        assert [message["content"] for message in sent] == ["", "", None, ""]
        assert sent[2]["tool_calls"] == [call | {"function": {"name": "f", "arguments": "{}"}}]
        asked = [{"role": "user", "content": [{"type": "input_text", "text": text} for text in "ab"]}]
        await found.client().post("/v1/responses", json={"model": "first", "input": asked})
        assert found.app.seen[-1][1]["input"] == asked

    run(test, tmp_path)


REFERRING = [
    {"previous_response_id": "resp_1"},
    {"store": True},
    {"background": True},
    {"input": [{"type": "item_reference", "id": "x"}]},
    {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "http://x"}]}]},
]


def test_responses_refer_to_nothing_that_is_kept(tmp_path):
    async def test(found):
        client = found.client()
        good = {"model": "first", "input": [{"role": "user", "content": [{"type": "input_text", "text": "a"}]}]}
        assert (await client.post("/v1/responses", json=good)).status_code == 200
        for changes in REFERRING:
            assert (await client.post("/v1/responses", json=good | changes)).status_code == 400, changes
        for method, path in (("GET", "/v1/responses/resp_1"), ("POST", "/v1/responses/resp_1/cancel")):
            assert (await client.request(method, path)).status_code == 404

    run(test, tmp_path)


def test_bodies_that_are_no_request(tmp_path):
    async def test(found):
        client, typed = found.client(), {"content-type": "application/json"}
        deep = '{"model": ' + "[" * 70 + "]" * 70 + "}"
        bodies = ["", "[]", "{", '{"a": NaN}', '{"model": "\ud800"}'.encode("utf-8", "surrogatepass"), deep, "[" * 4000]
        half = '{"model": "first", "messages": [{"role": "user", "content": "a"}], "tools": [{"type": "function", '
        half += '"function": {"name": "f", "description": "\\ud83d"}}]}'
        for body in [*bodies, half, json.dumps(chat(temperature=10**400)), json.dumps(chat(seed=-(10**400)))]:
            answer = await client.post("/v1/chat/completions", content=body, headers=typed)
            assert answer.status_code == 400, body[:20]
        whole = half.replace("\\ud83d", "\\ud83d\\ude00")
        assert (await client.post("/v1/chat/completions", content=whole, headers=typed)).status_code == 200
        assert len(found.app.seen) == 1
        found.app.seen.clear()
        large = await client.post("/v1/chat/completions", content=b"x" * 5000, headers=typed)
        assert large.status_code == 413

        async def unknown_length():
            for _ in range(100):
                yield b"x" * 100

        chunked = await client.post("/v1/chat/completions", content=unknown_length(), headers=typed)
        assert chunked.status_code == 413
        assert not found.app.seen

    run(test, tmp_path, max_body_bytes=4096)


@pytest.mark.parametrize("seconds", [1, 2.5])
def test_a_slow_body_is_given_up(tmp_path, seconds):
    """And its client, which may look for an answer only when it has sent all, gets one."""

    async def test(found):
        async def slow():
            yield b"{"
            await asyncio.sleep(seconds)
            yield b"}"

        headers = {"content-type": "application/json"}
        answer = await found.client().post("/v1/chat/completions", content=slow(), headers=headers)
        assert answer.status_code == 408

    run(test, tmp_path, body_seconds=0.2)


# -- what happens on the way ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_ends_the_engines_work(tmp_path, stream):
    async def test(found):
        task = asyncio.create_task(found.client().post("/v1/chat/completions", json=chat("w " * 200, stream=stream)))
        while not found.app.running:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.05)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        for _ in range(100):
            if not found.app.running and not found.gateway.open:
                break
            await asyncio.sleep(0.01)
        assert (found.app.running, found.app.cancelled, found.gateway.admission.active) == (0, 1, 0)

    run(test, tmp_path, seconds=0.02)


def test_more_requests_than_places_wait_and_more_than_that_are_refused(tmp_path):
    async def test(found):
        client = found.client()
        tasks = [asyncio.create_task(client.post("/v1/chat/completions", json=chat("a b c"))) for _ in range(6)]
        answers = await asyncio.gather(*tasks)
        assert sorted(answer.status_code for answer in answers) == [200, 200, 200, 200, 429, 429]
        refused = next(answer for answer in answers if answer.status_code == 429)
        assert refused.headers["retry-after"]
        assert (await client.get("/healthz")).status_code == 200

    run(test, tmp_path, seconds=0.05, concurrent=2, queue=2)


def test_a_client_that_goes_leaves_the_queue(tmp_path):
    async def test(found):
        client, admission = found.client(), found.gateway.admission
        running = asyncio.create_task(client.post("/v1/chat/completions", json=chat("a " * 40)))
        await _until(lambda: found.app.running)
        waiting = [asyncio.create_task(client.post("/v1/chat/completions", json=chat("left"))) for _ in range(2)]
        await _until(lambda: admission._waiting == 2)
        for task in waiting:
            task.cancel()
        await _until(lambda: admission._waiting == 0)
        assert (await client.post("/v1/chat/completions", json=chat("b"))).status_code == 200
        assert (await running).status_code == 200
        assert [body["messages"][0]["content"][0] for _, body in found.app.seen] == ["a", "b"]
        assert (admission.active, admission._free_places, dict(admission._of_key)) == (0, 1, {})

    run(test, tmp_path, seconds=0.05, concurrent=1, queue=2)


async def _until(condition):
    for _ in range(500):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("waited in vain")


def test_an_adapter_whose_engine_is_away_may_be_sent_again(tmp_path, monkeypatch):
    async def add(source):
        raise EngineDown("the stub is down")

    async def test(found):
        (tmp_path / "adapter").mkdir()
        monkeypatch.setattr(found.fleet, "add", add)
        body = {"name": "a", "path": str(tmp_path / "adapter")}
        answer = await found.client(found.admin).post("/admin/models", json=body)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "engine_down")
        assert answer.headers["retry-after"] and "x-should-retry" not in answer.headers

    run(test, tmp_path, adapter_roots=(str(tmp_path),))


def test_a_model_is_looked_up_again_after_the_guard(tmp_path):
    """Its engine may have been started again while the guard looked, and is not proven yet."""

    class Slow:
        async def request(self, request, path, body):
            found = self.found
            found.fleet._mark_unready(found.fleet.models["first"].engine)

    async def test(found):
        guard = found.gateway.inference.guard = Slow()
        guard.found = found
        answer = await found.client().post("/v1/chat/completions", json=chat())
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "starting")
        assert not found.app.seen

    run(test, tmp_path)


def test_a_stream_comes_as_the_engine_writes_it(tmp_path):
    async def test(found):
        async with found.client().stream("POST", "/v1/chat/completions", json=chat("a b c", stream=True)) as answer:
            lines = [line async for line in answer.aiter_lines() if line]
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert lines[-1] == "data: [DONE]"
        said = [json.loads(line[6:])["choices"][0]["delta"]["content"] for line in lines[:-1]]
        assert said == ["a", "b", "c"]

    run(test, tmp_path)


def test_an_engine_that_is_gone_is_a_503_and_its_models_are_not_ready(tmp_path):
    async def test(found):
        client = found.client()
        assert (await client.get("/readyz")).status_code == 200
        model = found.fleet.models["first"]
        engine = model.engine
        await engine.client.close()
        engine.client = None
        answer = await client.post("/v1/chat/completions", json=chat())
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
        found.fleet._mark_unready(engine)
        assert (await client.get("/readyz")).status_code == 503
        answer = await client.post("/v1/chat/completions", json=chat())
        assert answer.status_code == 503
        assert (await client.post("/v1/chat/completions", json=chat(model="second"))).status_code == 200

    run(test, tmp_path)


def test_metrics_and_feedback(tmp_path):
    async def test(found):
        client = found.client()
        answer = await client.post("/v1/chat/completions", json=chat(user="u1"))
        told = await client.post("/v1/feedback", json={"id": answer.json()["id"], "rating": -1, "correction": "no"})
        assert told.json()["answer"] == answer.headers["x-request-id"]
        for wrong in ({"id": "x"}, {"rating": 1}, {"id": "x", "rating": 2}, {"id": "x", "rating": 1, "z": 1}):
            assert (await client.post("/v1/feedback", json=wrong)).status_code == 400
        for value in (r"\ud83d", r"\u0000"):  # no database keeps them
            for body in (f'{{"id": "{value}", "rating": 1}}', f'{{"id": "x", "label": "{value}"}}'):
                wrong = await client.post("/v1/feedback", content=body, headers={"content-type": "application/json"})
                assert wrong.status_code == 400, body
        text = (await found.client(found.admin).get("/metrics")).text
        assert 'dstune_requests_total{model="first",route="/v1/chat/completions",status="200"} 1.0' in text
        assert 'dstune_model_proven{model="first",status="unproven"} 0.0' in text
        assert "unproven" in (await client.get("/v1/models/first")).text
        strange = await client.post("/v1/chat/completions", json=chat(model="x" * 500))
        assert strange.status_code == 404
        assert "xxx" not in (await found.client(found.admin).get("/metrics")).text

    run(test, tmp_path)


def test_no_text_of_a_request_is_in_logs_or_files(tmp_path, caplog):
    caplog.set_level("DEBUG", logger="dstune.serve")

    async def test(found):
        client = found.client()
        await client.post("/v1/chat/completions", json=chat("zebrafish"))
        await client.post("/v1/chat/completions", json=chat("zebrafish", temperature="zebrafish"))
        await client.post("/v1/chat/completions?zebrafish", json=chat(model="zebrafish"))
        await client.post("/zebrafish", json=chat())

    run(test, tmp_path)
    # The client of this test logs the addresses that it asks for, where an earlier test has set a level.
    logged = [record.getMessage() for record in caplog.records if not record.name.startswith("httpx")]
    assert logged
    assert not [text for text in logged if "zebrafish" in text]
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert files
    assert not [file for file in files if b"zebrafish" in file.read_bytes()]
