"""Batches: answers, limits, cancelling, kills of the server."""

from __future__ import annotations

import asyncio
import json
import time

import openai
import pytest

from dstune.finetuning.batches.lines import Answers
from dstune.finetuning.tables import Batch
from dstune.serve.store.keys import Keys, Limit
from tests.support.finetuning_calls import run, until


def requests(*bodies, url="/v1/chat/completions"):
    lines = [
        {"custom_id": f"r{number}", "method": "POST", "url": url, "body": body} for number, body in enumerate(bodies)
    ]
    return "".join(json.dumps(line) + "\n" for line in lines).encode()


def chat(text, model="first"):
    return {"model": model, "messages": [{"role": "user", "content": text}]}


async def ended(client, batch):
    for _ in range(400):
        row = await client.batches.retrieve(batch)
        if row.status in ("completed", "failed", "cancelled", "expired"):
            return row
        await asyncio.sleep(0.05)
    raise AssertionError(row)


def test_a_batch(tmp_path):
    async def test(found):
        client = found.openai(_strict_response_validation=True)
        bodies = [chat(f"word {number}") for number in range(12)] + [chat("x", model="none"), chat("explode")]
        file = await client.files.create(file=requests(*bodies), purpose="batch")
        given = {"endpoint": "/v1/chat/completions", "completion_window": "24h", "input_file_id": file.id}
        made = await client.batches.create(**given, metadata={"a": "b"})
        assert (made.status, made.metadata) == ("validating", {"a": "b"})
        again = {"x-stainless-retry-count": "1"}
        assert (await client.batches.create(**given, metadata={"a": "b"}, extra_headers=again)).id == made.id
        done = await ended(client, made.id)
        assert (done.status, done.request_counts.total) == ("completed", 14), done
        assert (done.request_counts.completed, done.request_counts.failed) == (12, 2)
        content = (await client.files.content(done.output_file_id)).text.splitlines()
        answers = {line["custom_id"]: line["response"] for line in map(json.loads, content)}
        assert len(answers) == 12
        assert answers["r3"]["body"]["choices"][0]["message"]["content"] == "word 3"
        assert answers["r3"]["status_code"] == 200 and answers["r3"]["request_id"].startswith("req_")
        errors = [json.loads(line) for line in (await client.files.content(done.error_file_id)).text.splitlines()]
        assert {line["custom_id"]: line["response"]["status_code"] for line in errors} == {"r12": 404, "r13": 502}
        assert errors[0]["response"]["body"]["error"].keys() == {"message", "type", "param", "code"}
        assert (await client.files.retrieve(done.output_file_id)).purpose == "batch_output"
        assert not list((tmp_path / "finetuning" / "batches").iterdir())
        assert [one.id async for one in client.batches.list()] == [made.id]
        with pytest.raises(openai.NotFoundError):
            await found.openai(found.other).batches.retrieve(made.id)
        with pytest.raises(openai.BadRequestError):
            await client.batches.cancel(made.id)

        bad = (
            b'{"custom_id": "a"}\nnothing\n'
            + requests(chat("a"), url="/v1/embeddings")
            + requests({"stream": True}) * 2
        )
        file = await client.files.create(file=bad, purpose="batch")
        failed = await ended(client, (await client.batches.create(**given | {"input_file_id": file.id})).id)
        assert failed.status == "failed"
        assert [(one.line, one.param, one.code) for one in failed.errors.data] == [
            (1, "method", "invalid_request"), (2, None, "invalid_json_line"), (3, "url", "invalid_request"),
            (4, "body.stream", "invalid_request"), (5, "body.stream", "invalid_request"),
        ]  # fmt: skip
        other = await client.files.create(file=requests(chat("a")), purpose="user_data")
        for wrong, kind in (
            ({"input_file_id": "file-none"}, openai.NotFoundError), ({"input_file_id": other.id}, openai.BadRequestError),
            ({"endpoint": "/v1/images/edits"}, openai.BadRequestError), ({"completion_window": "1h"}, openai.BadRequestError),
            ({"metadata": {"a" * 65: "b"}}, openai.BadRequestError),
        ):  # fmt: skip
            with pytest.raises(kind):
                await client.batches.create(**given | wrong)
        usage = found.openai(admin_api_key=found.owner, key=found.owner).admin.organization.usage
        await found.gateway.recorder.flush()
        page = await usage.completions(start_time=int(time.time()) - 3600, group_by=["model", "project_id"])
        (used,) = [result for bucket in page.data for result in bucket.results]
        assert (used.num_model_requests, used.input_tokens, used.output_tokens) == (12, 12, 24)
        assert (used.model, used.project_id) == ("first", "proj_default")

    run(test, tmp_path, models=["first"])


def test_a_batch_is_cancelled(tmp_path):
    async def test(found):
        client = found.openai()
        found.stub.seconds = 0.2
        file = await client.files.create(file=requests(*[chat("a b c d e f")] * 40), purpose="batch")
        made = await client.batches.create(
            endpoint="/v1/chat/completions", completion_window="24h", input_file_id=file.id
        )
        await until(lambda: found.stub.finished >= 2)
        assert (await client.batches.cancel(made.id)).status == "cancelling"
        done = await ended(client, made.id)
        assert done.status == "cancelled" and done.cancelled_at
        assert (await client.batches.cancel(made.id)).status == "cancelled"
        lines = (await client.files.content(done.output_file_id)).text.splitlines()
        assert 2 <= len(lines) < 40
        assert done.request_counts.completed == len(lines)

    run(test, tmp_path, models=["first"])


def test_a_batch_whose_day_is_over_and_one_whose_key_is_revoked(tmp_path, monkeypatch):
    async def test(found):
        client = found.openai()
        found.stub.seconds = 0.2
        file = await client.files.create(file=requests(*[chat("a b c d e f")] * 40), purpose="batch")
        given = {"endpoint": "/v1/chat/completions", "completion_window": "24h", "input_file_id": file.id}
        made = await client.batches.create(**given)
        await until(lambda: found.stub.finished >= 2)
        monkeypatch.setattr("dstune.finetuning.batches.worker.unix_time", lambda: made.expires_at + 1)
        done = await ended(client, made.id)
        assert (done.status, done.expired_at) == ("expired", made.expires_at + 1)
        lines = (await client.files.content(done.output_file_id)).text.splitlines()
        assert 2 <= len(lines) < 40
        monkeypatch.undo()
        keys = found.gateway.keys
        caller = keys.find(keys.add("short-lived"))
        assert keys.by_id(caller.id) == caller
        keys.revoke("short-lived")
        assert keys.by_id(caller.id) is None
        monkeypatch.setattr(Keys, "by_id", lambda self, own: None)
        made = await client.batches.create(**given)
        failed = await ended(client, made.id)
        assert (failed.status, failed.errors.data[0].code) == ("failed", "invalid_api_key")

    run(test, tmp_path, models=["first"])


def test_batches_of_several_projects_are_answered_beside_each_other(tmp_path):
    async def test(found):
        client, other = found.openai(), found.openai(found.other)
        found.stub.seconds = 0.05
        given = {"endpoint": "/v1/chat/completions", "completion_window": "24h"}
        long = requests(*[chat("a b c d e f g h")] * 60)
        file = (await client.files.create(file=long, purpose="batch")).id
        mine = [(await client.batches.create(**given, input_file_id=file)).id for _ in range(5)]
        short = (await other.files.create(file=requests(chat("a")), purpose="batch")).id
        theirs = (await other.batches.create(**given, input_file_id=short)).id
        # Four are worked on at a time; whose project has none is next.
        await client.batches.cancel(mine[0])
        assert (await ended(other, theirs)).status == "completed"
        assert (await client.batches.retrieve(mine[4])).status == "validating"
        for batch in mine:
            await client.batches.cancel(batch)
        for batch in mine:
            await ended(client, batch)

    run(test, tmp_path, models=["first"])


def test_a_batch_has_the_limits_of_its_key_and_ends_with_it(tmp_path):
    async def test(found):
        keys = found.gateway.keys
        client = found.openai(keys.add("poor", limit=Limit(tokens_per_day=20)))
        file = (await client.files.create(file=requests(*[chat("a b c d e f")] * 40), purpose="batch")).id
        given = {"endpoint": "/v1/chat/completions", "completion_window": "24h", "input_file_id": file}
        made = await client.batches.create(**given)
        await until(lambda: found.stub.finished >= 3)
        await asyncio.sleep(1.0)
        assert found.stub.finished <= 3 + 4  # each answer has 7 tokens, and four are asked for at once
        keys.revoke("poor")
        done = await ended(found.openai(), made.id)
        assert (done.status, done.errors.data[0].code) == ("failed", "invalid_api_key")
        await until(lambda: not list((tmp_path / "finetuning" / "batches").iterdir()))  # it is shown as failed first
        raw = found.http(**{"content-type": "application/json"})
        for name in (rb"\ud800", rb"\u0000"):
            body = b'{"endpoint": "/v1/chat/completions", "completion_window": "24h", "input_file_id": "%s"}' % name
            assert (await raw.post("/v1/batches", content=body)).status_code == 400

    run(test, tmp_path, models=["first"])


def test_a_line_that_the_server_cannot_answer_is_an_error_of_its_own(tmp_path, monkeypatch):
    async def test(found):
        usual = found.gateway.inference.model_of

        def model_of(request, name):
            if name == "broken":
                raise RuntimeError("/secret/path")
            return usual(request, name)

        monkeypatch.setattr(found.gateway.inference, "model_of", model_of)
        client = found.openai()
        bodies = [chat("a"), chat("b", model="broken"), chat("c")]
        file = (await client.files.create(file=requests(*bodies), purpose="batch")).id
        given = {"endpoint": "/v1/chat/completions", "completion_window": "24h", "input_file_id": file}
        done = await ended(client, (await client.batches.create(**given)).id)
        assert (done.status, done.request_counts.completed, done.request_counts.failed) == ("completed", 2, 1)
        error = json.loads((await client.files.content(done.error_file_id)).text)
        assert (error["response"]["status_code"], "secret" in str(error)) == (500, False)

    run(test, tmp_path, models=["first"])


def test_a_batch_ends_as_it_would_have_without_a_kill_of_the_server(tmp_path):
    """Killed when it was answered in part and out of time; when the next server has another disk; and behind its end."""

    folder = tmp_path / "finetuning" / "batches"
    (folder / "batch_left").mkdir(parents=True)

    async def test(found):
        client = found.openai()
        file = await client.files.create(file=requests(chat("a"), chat("b"), chat("c")), purpose="batch")
        given = {"endpoint": "/v1/chat/completions", "input_file_id": file.id}
        found.stub.seconds = 0.01

        def add(name, status, **details):
            with found.gateway.database.writing.begin() as session:
                caller = found.gateway.keys.find(found.key)
                row = Batch(
                    id=f"batch_{name}", created_at=1, project=caller.project, key=caller.id, endpoint=given["endpoint"],
                    input_file=file.id, status=status, details={"expires_at": 4_000_000_000, **details},
                )  # fmt: skip
                session.add(row)

        (folder / "batch_part").mkdir()
        (folder / "batch_part" / "input.jsonl").touch()
        Answers(folder / "batch_part" / "output.jsonl").add({"custom_id": "0", "response": {}})
        add("part", "finalizing", request_counts={"total": 3, "completed": 1, "failed": 0})
        add("moved", "in_progress", request_counts={"total": 3, "completed": 1, "failed": 0})
        add("late", "finalizing", request_counts={"total": 3, "completed": 3, "failed": 0})
        part, moved, late = [await ended(client, f"batch_{name}") for name in ("part", "moved", "late")]
        assert (part.status, part.request_counts.completed) == ("expired", 1)
        assert (await client.files.content(part.output_file_id)).text.count("\n") == 1
        for one in (moved, late):
            assert (one.status, one.request_counts.completed) == ("completed", 3)
            assert (await client.files.content(one.output_file_id)).text.count("\n") == 3
        await until(lambda: not list(folder.iterdir()))

    run(test, tmp_path, models=["first"])


def test_a_batch_of_a_project_without_space_ends(tmp_path):
    async def test(found):
        client = found.openai()
        content = requests(chat("a"), chat("b"))
        file = await client.files.create(file=content, purpose="batch")
        given = {"endpoint": "/v1/chat/completions", "completion_window": "24h", "input_file_id": file.id}
        done = await ended(client, (await client.batches.create(**given)).id)
        assert (done.status, (await client.files.content(done.output_file_id)).text.count("\n")) == ("completed", 2)
        with pytest.raises(openai.RateLimitError):
            await client.files.create(file=content * 2, purpose="batch")

    size = len(requests(chat("a"), chat("b")))
    run(test, tmp_path, models=["first"], api={"project_bytes": size})


def test_a_batch_resumes_after_a_truncated_line(tmp_path):
    answers = Answers(tmp_path / "output.jsonl")
    answers.add({"custom_id": "a"})
    answers.add({"custom_id": "b"})
    with answers.path.open("ab") as file:
        file.write(b'{"custom_id": "c", "resp')
    again = Answers(answers.path)
    assert again.ids == {"a", "b"}
    again.add({"custom_id": "c"})
    assert [json.loads(line)["custom_id"] for line in answers.path.read_text().splitlines()] == ["a", "b", "c"]


def test_no_batch_without_a_model(tmp_path):
    async def test(found):
        client = found.openai()
        file = await client.files.create(file=requests(chat("a")), purpose="batch")
        with pytest.raises(openai.BadRequestError) as caught:
            await client.batches.create(endpoint="/v1/chat/completions", completion_window="24h", input_file_id=file.id)
        assert caught.value.code == "no_models"

    run(test, tmp_path)
