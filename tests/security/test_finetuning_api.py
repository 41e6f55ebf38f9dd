"""Attacks on the fine-tuning API by its clients: group 7 of the demands on it, tenants, and addresses of webhooks."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import threading
from collections.abc import Awaitable, Callable

import openai
import pytest

from dstune.finetuning import forms, receiving, turns, webhooks
from dstune.finetuning.addresses import PublicResolver, checked_url, is_public
from dstune.finetuning.batches import handlers as batch_handlers
from dstune.finetuning.graders import handlers
from dstune.finetuning.graders.grader import run_grader
from dstune.finetuning.jobs import trainings
from dstune.finetuning.jobs.folder import write
from dstune.grading import grader as grader_module
from dstune.serve.errors import ApiError
from dstune.serve.server import BoundedHttp
from tests.support.finetuning_calls import run
from tests.support.jobs import Bench
from tests.support.offices import Office, in_office

ROW = b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'


def test_group_7_one_tenant_sees_nothing_of_another(tmp_path):
    async def test(found):
        mine, other = found.openai(), found.openai(found.other)
        file = (await mine.files.create(file=ROW, purpose="fine-tune")).id
        upload = await mine.uploads.create(filename="a", purpose="batch", bytes=3, mime_type="text/plain")
        part = await mine.uploads.parts.create(upload.id, data=b"abc")
        theirs = await other.uploads.create(filename="a", purpose="batch", bytes=3, mime_type="text/plain")
        assert (await other.files.list()).data == []
        for call in (
            other.files.retrieve(file), other.files.content(file), other.files.delete(file),
            other.uploads.parts.create(upload.id, data=b"x"), other.uploads.cancel(upload.id),
            other.uploads.complete(upload.id, part_ids=[part.id]),
        ):  # fmt: skip
            with pytest.raises(openai.NotFoundError):
                await call
        with pytest.raises(openai.BadRequestError) as caught:
            await other.uploads.complete(theirs.id, part_ids=[part.id])
        assert caught.value.code == "part_not_found"
        with pytest.raises(openai.BadRequestError):
            await other.files.list(after=file)
        assert (await mine.files.content(file)).content == ROW

    run(test, tmp_path)


def refused_bytes(url: str, key: str, size: int) -> tuple[bytes, int]:
    """The answer to an upload of `size` bytes, and how many of them the server took before it hung up."""
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65536)
        head = (
            f"POST /v1/files HTTP/1.1\r\nHost: {host}:{port}\r\nAuthorization: Bearer {key}\r\n"
            f"Content-Type: multipart/form-data; boundary=x\r\nContent-Length: {size}\r\n\r\n"
            '--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
        )
        connection.sendall(head.encode())
        connection.settimeout(20)
        sent, answer = 0, b""
        chunk = b"z" * 65536
        try:
            while sent < size:
                sent += connection.send(chunk)
        except (ConnectionError, TimeoutError):
            pass
        try:
            while piece := connection.recv(65536):
                answer += piece
        except (ConnectionError, TimeoutError):
            pass
    return answer, sent


def test_group_7_a_gigabyte_without_a_key_is_not_read(tmp_path, monkeypatch):
    read, usual = [0], BoundedHttp.data_received

    def counted(self, data):
        read[0] += len(data)
        usual(self, data)

    monkeypatch.setattr(BoundedHttp, "data_received", counted)

    async def test(found):
        answer, sent = await asyncio.to_thread(refused_bytes, found.url, "nothing", 1 << 30)
        assert read[0] < 1 << 20, read
        assert b"401 Unauthorized" in answer and b"x-request-id" in answer
        # What the kernel's buffers of both ends take is sent, but never read by the server.
        assert sent < 8 << 20, sent
        with pytest.raises(openai.AuthenticationError):
            await found.openai("nothing").files.create(file=b"x" * 700_000, purpose="batch")

        def synchronous() -> None:
            with openai.OpenAI(base_url=f"{found.url}/v1", api_key="nothing", max_retries=0) as client:
                client.files.create(file=b"x" * (20 << 20), purpose="batch")

        with pytest.raises(openai.AuthenticationError):
            await asyncio.to_thread(synchronous)
        assert found.gateway.open == 0

    run(test, tmp_path)


SPECIAL = (
    "168.63.129.16", "100.100.100.200", "192.0.0.192", "169.254.169.254", "fd00:ec2::254", "fec0::1", "fd20:ce::254",
    "192.88.99.1", "::ffff:168.63.129.16", "2002:a83f:8110::1", "64:ff9b::a83f:8110", "64:ff9b:1::a83f:8110", "3fff::1",
    "2001:20::1", "2001:db8::1", "5f00::1", "100::1", "198.18.0.1", "203.0.113.1", "240.0.0.1", "255.255.255.255", "0.0.0.0",
    "10.0.0.1", "127.0.0.1", "::1", "::", "::127.0.0.1", "ff02::1", "fe80::1", "224.0.0.1",
)  # fmt: skip


def test_addresses_of_clouds_and_special_networks_are_not_public():
    assert [address for address in SPECIAL if is_public(address)] == []
    for address in ("1.1.1.1", "168.63.129.17", "2606:4700::1111", "64:ff9b::101:101", "2002:101:101::1"):
        assert is_public(address), address
    hosts = (
        "localhost",
        "localhost.",
        "a.localhost",
        "127%2e0%2e0%2e1",
        "0x7f000001",
        "127.1",
        "127.0.0.1.",
        "a.b%00c",
    )
    for host in (*hosts, *(f"[{one}]" if ":" in one else one for one in SPECIAL)):
        with pytest.raises(ApiError):
            checked_url(f"https://{host}/", ())
    for host in ("example.com", "example.com.", "a-b.example.com:8443", "1.1.1.1", "[2606:4700::1111]"):
        assert checked_url(f"https://{host}/", ())


def test_a_name_that_stands_for_a_private_address_is_refused_at_the_connection(monkeypatch):
    answers = {
        "good.example": "1.1.1.1",
        "rebound.example": "127.0.0.1",
        "2130706433": "127.0.0.1",
        "azure.example": "168.63.129.16",
    }

    async def resolved(self, host, port, **options):
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (answers[host], port))]

    monkeypatch.setattr(asyncio.BaseEventLoop, "getaddrinfo", resolved)

    async def test():
        resolver = PublicResolver()
        assert (await resolver.resolve("good.example", 443))[0]["host"] == "1.1.1.1"
        for host in ("rebound.example", "2130706433", "azure.example"):
            with pytest.raises(OSError, match="not public"):
                await resolver.resolve(host, 443)

    asyncio.run(test())


def test_folders_of_jobs_count_towards_the_space_of_their_project(tmp_path):
    """Upload, job, delete, pause, and again: the bytes stay in the folders of the jobs."""

    async def test(found: Office) -> None:
        client, other = found.cloud.openai(), found.cloud.openai(found.cloud.other)
        jobs: list[str] = []

        async def again() -> None:
            rows = ROW * (300 + len(jobs))
            file = await client.files.create(file=("rows.jsonl", rows), purpose="fine-tune")
            job = await found.create(client, training_file=file.id)
            await client.files.delete(file.id)
            await found.reach(client, job.id, "running", "queued")
            await client.fine_tuning.jobs.pause(job.id)
            found.launcher.alive.discard(job.id)
            await found.reach(client, job.id, "paused")
            jobs.append(job.id)

        assert (await _refusal(again)).response.headers["retry-after"] == "60"
        stored = sum(path.stat().st_size for path in (found.cloud.api.folder / "jobs").rglob("*") if path.is_file())
        assert 1 <= len(jobs) <= 3
        assert stored <= SPACE + len(ROW) * 300
        await other.files.create(file=ROW, purpose="fine-tune")
        for job in jobs:
            await client.fine_tuning.jobs.cancel(job)
        await _allowed(lambda: client.files.create(file=ROW * 400, purpose="fine-tune"))

    in_office(tmp_path, test, project_bytes=SPACE)


SPACE = 70_000


async def _refusal(call: Callable[[], Awaitable[object]]) -> openai.RateLimitError:
    """That of a project without space, which comes as soon as its folders were measured."""
    for _ in range(40):
        try:
            await call()
        except openai.RateLimitError as error:
            return error
        await asyncio.sleep(0.05)
    raise AssertionError("it was never refused")


async def _allowed(call: Callable[[], Awaitable[object]]) -> None:
    for _ in range(200):
        try:
            await call()
        except openai.RateLimitError:
            await asyncio.sleep(0.05)
        else:
            return
    raise AssertionError("it is refused for ever")


def test_files_of_one_organization_keep_no_other_one_from_validation(tmp_path):
    bench = Bench(tmp_path)
    bench.launcher.validates = False
    mine = [bench.add() for _ in range(6)]
    theirs = bench.add(bench.organization("b"))
    bench.step(2)
    assert [job for job, _ in bench.launcher.started] == [mine[0], theirs]
    third = bench.add(bench.organization("c"))
    for job in (mine[0], theirs):
        write(bench.of(job).validated, {"training_file": {"rows": 12}, "warnings": []})
        bench.launcher.alive.discard(job)
    bench.step(2)
    assert [job for job, task in bench.launcher.started if task["phase"] == "validate"] == [
        mine[0],
        theirs,
        third,
        mine[1],
    ]
    bench.database.close()


@pytest.mark.ci
def test_a_running_job_ends_well_in_a_project_without_space(tmp_path, monkeypatch):
    monkeypatch.setattr(trainings, "MEASURE_SECONDS", 0.0)

    async def test(found: Office) -> None:
        client = found.cloud.openai(found.cloud.owner)
        file = (await client.files.create(file=("rows.jsonl", ROW * 12), purpose="fine-tune")).id
        given = {"training_file": file, "hyperparameters": {"n_epochs": 2, "batch_size": 3}}
        job = await found.create(client, **given)
        await found.reach(client, job.id, "running")
        second = await found.create(client, **given)
        await found.reach(client, second.id, "queued")
        export = found.folder(job.id).models / "step-8"
        export.mkdir(parents=True)
        (export / "adapter_model.safetensors").write_bytes(b"\0" * SPACE)
        upload = await client.uploads.create(filename="a", purpose="batch", bytes=3, mime_type="text/plain")
        for call in (
            lambda: client.files.create(file=os.urandom(8), purpose="batch"),  # equal bytes need no space
            lambda: client.uploads.parts.create(upload.id, data=b"abc"),
            lambda: found.create(client, **given),
        ):
            assert (await _refusal(call)).code == "insufficient_quota"
        found.train(job.id, 8)
        found.finish(job.id)
        done = await found.reach(client, job.id, "succeeded")
        await asyncio.sleep(1.5)  # the loop has looked at it again
        assert (await client.fine_tuning.jobs.retrieve(second.id)).status == "queued"
        newest = await client.fine_tuning.jobs.list_events(second.id, limit=1)
        assert newest.data[0].level == "warn"
        await client.models.delete(done.fine_tuned_model)
        checkpoints = [one async for one in client.fine_tuning.jobs.checkpoints.list(job.id)]
        for checkpoint in checkpoints[1:]:
            await client.models.delete(checkpoint.fine_tuned_model_checkpoint)
        await found.reach(client, second.id, "running")
        await client.files.create(file=ROW, purpose="fine-tune")

    in_office(tmp_path, test, devices=1, project_bytes=SPACE)


async def _begin_upload(url: str, key: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """An upload of which the head and the first bytes have come."""
    host, port = url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    head = (
        f"POST /v1/files HTTP/1.1\r\nHost: {host}:{port}\r\nAuthorization: Bearer {key}\r\n"
        "Content-Type: multipart/form-data; boundary=x\r\nContent-Length: 100000000\r\n\r\n"
        '--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\nz'
    )
    writer.write(head.encode())
    await writer.drain()
    return reader, writer


def test_slow_uploads_of_one_key_keep_no_other_key_out(tmp_path):
    async def test(found):
        keys = [found.key, found.owner, found.admin]
        writers = [(await _begin_upload(found.url, key))[1] for key in keys for _ in range(40)]
        for _ in range(100):
            if found.gateway.open == receiving.MOST_OF_PROJECT + 1:  # the others were refused
                break
            await asyncio.sleep(0.05)
        with pytest.raises(openai.RateLimitError) as caught:
            await found.openai().files.create(file=ROW, purpose="batch")
        assert caught.value.response.headers["retry-after"] == "1"
        await found.openai(found.other).files.create(file=ROW, purpose="batch")
        mine = found.gateway.keys.add("newcomer")
        await found.openai(mine).files.create(file=ROW, purpose="batch")  # of the same project
        for writer in writers:
            writer.close()
        for _ in range(100):
            if found.gateway.open == 0:
                break
            await asyncio.sleep(0.05)
        await found.openai().files.create(file=ROW, purpose="batch")

    run(test, tmp_path)


def test_an_upload_that_trickles_is_cut_off(tmp_path, monkeypatch):
    """Also one that began fast: each window of time counts by itself."""
    monkeypatch.setattr(forms, "WINDOW_SECONDS", 0.3)

    async def test(found):
        reader, writer = await _begin_upload(found.url, found.key)
        writer.write(b"z" * 1_000_000)
        answer = asyncio.create_task(reader.read(65536))
        for _ in range(100):
            await asyncio.sleep(0.05)
            if answer.done():
                break
            writer.write(b"z")
        assert b" 408 " in answer.result()
        assert b"x-should-retry: false" in answer.result()
        writer.close()
        assert list((found.folder / "finetuning" / "tmp").iterdir()) == []

    run(test, tmp_path)


GRADER = {"type": "string_check", "name": "g", "input": "{{ item.a }}", "reference": "a", "operation": "eq"}


def test_graders_of_one_project_keep_no_other_one_waiting(tmp_path, monkeypatch):
    """Nor do uploads that are put together, and jobs that are created, which have the same turns."""
    order, go = [], threading.Event()

    def slow(grader, sample):
        go.wait(20)
        order.append(sample.text)
        return {}

    monkeypatch.setattr(handlers, "run_grader", slow)

    async def test(found):
        mine, other = found.http(), found.http(found.other)

        async def ask(client, name):
            body = {"grader": GRADER, "model_sample": name}
            return (await client.post("/v1/fine_tuning/alpha/graders/run", json=body)).status_code

        many = [asyncio.create_task(ask(mine, f"mine {number}")) for number in range(turns.MOST_WAITING)]
        while handlers._GRADING._waiting["proj_default"] < turns.MOST_WAITING:
            await asyncio.sleep(0.02)
        refused = await mine.post("/v1/fine_tuning/alpha/graders/validate", json={"grader": GRADER})
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
        theirs = asyncio.create_task(ask(other, "theirs"))
        while not handlers._GRADING._waiting["proj_other"]:
            await asyncio.sleep(0.02)
        go.set()
        assert {await task for task in (*many, theirs)} == {200}
        assert order.index("theirs") <= 2, order

    run(test, tmp_path)


def test_a_sample_is_read_once_for_all_graders(monkeypatch):
    """A `multi` of 32 graders over a sample of 1 MB was a minute's work for a request of 2 MB."""
    parsed, loads = [], json.loads
    monkeypatch.setattr(grader_module.json, "loads", lambda text: parsed.append(1) or loads(text))
    graders = {
        f"g{number}": {**GRADER, "name": f"g{number}", "input": "{{ sample.output_json }}"} for number in range(32)
    }
    multi = {"type": "multi", "name": "m", "graders": graders, "calculate_output": "g1"}
    assert run_grader(multi, grader_module.Sample("[[]]", {}))["reward"] == 0
    assert len(parsed) == 1
    monkeypatch.setattr(grader_module, "MOST_SECONDS", 0.0)
    graded = run_grader(multi, grader_module.Sample("[[]]", {}))
    assert graded["metadata"]["errors"]["unresponsive_reward_error"]


def test_batches_and_tried_webhooks_of_a_project_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(batch_handlers, "MOST_OPEN", 2)
    go = asyncio.Event()

    async def send(self, row, event, body):
        await go.wait()
        return 200

    monkeypatch.setattr(webhooks.Webhooks, "send", send)

    async def test(found):
        client = found.http()
        monkeypatch.setattr("dstune.finetuning.batches.worker.BatchWorker._claim", lambda self: None)
        file = (await found.openai().files.create(file=b"{}\n", purpose="batch")).id
        body = {"input_file_id": file, "endpoint": "/v1/completions", "completion_window": "24h"}
        answers = [await client.post("/v1/batches", json=body) for _ in range(3)]
        assert [answer.status_code for answer in answers] == [200, 200, 429]
        assert answers[2].headers["retry-after"]
        await client.post(f"/v1/batches/{answers[0].json()['id']}/cancel")
        endpoint = {"name": "a", "url": "https://example.com/", "event_types": ["batch.completed"]}
        path = f"/v1/webhook_endpoints/{(await client.post('/v1/webhook_endpoints', json=endpoint)).json()['id']}/test"
        ask = [asyncio.create_task(client.post(path, json={"event_type": "batch.completed"})) for _ in range(6)]
        await asyncio.wait(ask, timeout=5, return_when=asyncio.FIRST_COMPLETED)
        await asyncio.sleep(0.2)
        go.set()
        codes = sorted([(await task).status_code for task in ask])
        assert codes == [200] * webhooks.MOST_TESTS + [429] * 2

    run(test, tmp_path, models=("base",))
