"""Webhooks, batches, usage, costs, the audit log and secrets, with the official client where it knows them."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import time

import openai
import pytest

from dstune.core.errors import DstuneError, UserError
from dstune.serve import command, extra, keys_command
from dstune.serve.errors import ApiError
from dstune.serve.finetuning import deliveries as deliveries_module
from dstune.serve.finetuning.addresses import checked_url, is_public
from dstune.serve.finetuning.batches.lines import Answers
from dstune.serve.finetuning.jobs.build import Parts
from dstune.serve.finetuning.jobs.folder import JobFolder, write
from dstune.serve.finetuning.jobs.reconciler import Machine
from dstune.serve.finetuning.tables import Batch, Delivery, Secret, Usage
from dstune.serve.finetuning.vault import Vault
from dstune.serve.store.database import Database
from dstune.serve.store.keys import Keys, Limit
from tests.support.finetuning import cloud
from tests.support.jobs import StubLauncher, StubPlans
from tests.support.serving import listening


def run(test, tmp_path, **options):
    async def main():
        async with cloud(tmp_path, **options) as found:
            return await test(found)

    return asyncio.run(main())


class Receiver:
    """What a webhook's receiver was sent, and what it says to that."""

    def __init__(self, *statuses: int):
        self.statuses, self.seen = list(statuses), []

    async def __call__(self, scope, receive, send):
        body = (await receive())["body"]
        self.seen.append(({name.decode(): value.decode() for name, value in scope["headers"]}, body))
        status = self.statuses.pop(0) if self.statuses else 200
        headers = [(b"location", b"http://127.0.0.1:1/")] if status == 302 else []
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": b"x"})


async def until(check, seconds=20.0):
    end = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < end, "it does not come"
        await asyncio.sleep(0.02)


# -- webhooks


@pytest.mark.parametrize(
    "url",
    [
        "http://example.org/", "ftp://example.org", "https://", "https://127.0.0.1/", "https://10.0.0.1/x", "https://[::1]/",
        "https://169.254.169.254/latest/meta-data", "https://[::ffff:10.0.0.1]/", "https://[64:ff9b::a00:1]/",
        "https://user:word@example.org/", "https://example.org/#x", "https://localhost/", "https://a.localhost/",
        "https://exa mple.org/", "https://example.org:0/", "https://example.org:99999/", "https://bücher.example/", "x" * 3000,
        "https://[::1", 5, None, "https://0.0.0.0/", "https://224.0.0.1/", "https://[fe80::1%25eth0]/",
        "https://2130706433/", "https://127.1/", "https://0x7f.1/", "https://127.0.0.1./", "https://a.0x7f000001/",
    ],
)  # fmt: skip
def test_addresses_that_no_webhook_may_have(url):
    with pytest.raises(ApiError) as caught:
        checked_url(url, frozenset())
    assert (caught.value.status, caught.value.param) == (400, "url")


def test_addresses_of_the_internet_and_of_the_operator():
    assert checked_url("https://example.org:8443/a?b=c", frozenset())
    assert checked_url("https://1.1.1.1/", frozenset())
    allowed = frozenset({"hooks.internal", "http://127.0.0.1:9000"})
    assert checked_url("https://hooks.internal/x", allowed)
    assert checked_url("http://127.0.0.1:9000/x", allowed)
    for url in ("http://127.0.0.1:9001/x", "http://hooks.internal/", "https://127.0.0.1:9000/"):
        with pytest.raises(ApiError):
            checked_url(url, allowed)
    public = {
        "1.1.1.1": True,
        "192.168.1.1": False,
        "100.64.0.1": False,
        "2606:4700::1111": True,
        "fd00::1": False,
        "a": False,
    }
    assert {address: is_public(address) for address in public} == public


def test_webhooks_as_the_client_verifies_them(tmp_path, monkeypatch):
    monkeypatch.setattr(deliveries_module, "PAUSES", (0.05,))

    async def test():
        receiver = Receiver(500, 302, 200)
        async with listening(receiver) as url:
            options = {"webhook_hosts": frozenset({url}), "delivery_seconds": 0.05}
            async with cloud(tmp_path, api=options) as found:
                client, other = found.openai(_strict_response_validation=True), found.openai(found.other)
                kinds = ["fine_tuning.job.succeeded", "batch.completed"]
                made = await client.webhooks.create(name="mine", url=f"{url}/hook", event_types=kinds)
                assert made.signing_secret.startswith("whsec_")
                lost = {"x-stainless-retry-count": "1"}
                same = {"name": "mine", "url": f"{url}/hook", "event_types": kinds, "extra_headers": lost}
                assert (await client.webhooks.create(**same)).signing_secret == made.signing_secret
                await other.webhooks.create(name="theirs", url=f"{url}/hook", event_types=kinds)
                with found.api.database.writing.begin() as session:
                    found.api.webhooks.enqueue(session, "proj_default", "fine_tuning.job.succeeded", "ftjob-1")
                    found.api.webhooks.enqueue(session, "proj_default", "fine_tuning.job.failed", "ftjob-2")
                await until(lambda: len(receiver.seen) == 3)  # 500 and a redirect are not taken for an answer
                await until(lambda: states(found) == ["delivered"])
                assert len({headers["webhook-id"] for headers, _ in receiver.seen}) == 1
                for headers, body in receiver.seen:
                    event = client.webhooks.unwrap(body, headers, secret=made.signing_secret)
                    assert (event.type, event.data.id) == ("fine_tuning.job.succeeded", "ftjob-1")
                    with pytest.raises(openai.InvalidWebhookSignatureError):
                        client.webhooks.unwrap(body + b" ", headers, secret=made.signing_secret)
                with found.api.database.session() as session:
                    assert made.signing_secret not in str(session.query(Delivery).one().body)
                kept = await client.webhooks.rotate_secret(made.id, keep_old_secret_active_for_24_hours=True)
                again = await client.webhooks.rotate_secret(
                    made.id, keep_old_secret_active_for_24_hours=True, extra_headers=lost
                )
                assert again.signing_secret == kept.signing_secret
                tested = await client.webhooks.test(made.id, event_type="batch.completed")
                assert tested.status_code == 200
                headers, body = receiver.seen[-1]
                for secret in (made.signing_secret, kept.signing_secret):
                    assert client.webhooks.unwrap(body, headers, secret=secret).type == "batch.completed"
                await client.webhooks.rotate_secret(made.id)
                await client.webhooks.test(made.id, event_type="batch.completed")
                with pytest.raises(openai.InvalidWebhookSignatureError):
                    client.webhooks.unwrap(receiver.seen[-1][1], receiver.seen[-1][0], secret=kept.signing_secret)
                updated = await client.webhooks.update(made.id, name="other")
                assert (updated.name, updated.url) == ("other", f"{url}/hook")
                assert [one.id async for one in client.webhooks.list()] == [made.id]
                assert (await client.webhooks.retrieve(made.id)).signing_secret_hint.startswith("whsec_")
                for call in (other.webhooks.retrieve, other.webhooks.delete, other.webhooks.rotate_secret):
                    with pytest.raises(openai.NotFoundError):
                        await call(made.id)
                for given in (
                    {"url": "http://127.0.0.1:1/"}, {"url": "https://10.1.1.1/"}, {"event_types": ["response.completed"]},
                    {"event_types": []}, {"name": ""},
                ):  # fmt: skip
                    with pytest.raises(openai.BadRequestError):
                        await client.webhooks.create(**{"name": "a", "url": f"{url}/", "event_types": kinds} | given)
                raw = found.http(**{"content-type": "application/json"})
                for body in (rb'{"name": "\ud800"}', rb'{"name": "\u0000"}'):
                    refused = await raw.post(f"/v1/webhook_endpoints/{made.id}", content=body)
                    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "name")
                assert (await client.webhooks.delete(made.id)).deleted
                assert (await client.webhooks.delete(made.id, extra_headers=lost)).deleted
                with pytest.raises(openai.NotFoundError):
                    await client.webhooks.retrieve(made.id)

    asyncio.run(test())


def states(found) -> list[str]:
    with found.api.database.session() as session:
        return [row.state for row in session.query(Delivery)]


def test_a_receiver_that_cannot_be_reached(tmp_path):
    async def test(found):
        client = found.openai()
        made = await client.webhooks.create(name="a", url="https://nowhere.invalid/", event_types=["batch.completed"])
        with pytest.raises(openai.BadRequestError) as caught:
            await client.webhooks.test(made.id, event_type="batch.completed")
        assert (caught.value.code, caught.value.message.count("nowhere")) == ("webhook_unreachable", 0)
        assert "fine_tuning.job.succeeded" in (await client.webhooks.event_types.list()).data

    run(test, tmp_path)


def test_the_end_of_a_job_is_told_and_its_processes_get_the_projects_own_key(tmp_path):
    presets = tmp_path / "models.yaml"
    presets.write_text(json.dumps({"models": {"tiny": {"path": "base", "learning_rate": {"supervised": 0.001}}}}))
    launcher = StubLauncher()
    parts = Parts(presets, launcher=launcher, planner=StubPlans(), machine=Machine(1))
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}

    async def test():
        receiver = Receiver()
        async with listening(receiver) as url:
            options = {"webhook_hosts": frozenset({url}), "delivery_seconds": 0.05}
            async with cloud(tmp_path, api=options, parts=parts) as found:
                client = found.openai()
                made = await client.webhooks.create(
                    name="a", url=url, event_types=["fine_tuning.job.cancelled", "fine_tuning.job.failed"]
                )
                file = await client.files.create(file=(json.dumps(row) + "\n").encode() * 12, purpose="fine-tune")
                given = {"model": "tiny", "training_file": file.id}
                wandb = {"integrations": [{"type": "wandb", "wandb": {"project": "p"}}]}
                with pytest.raises(openai.BadRequestError) as caught:
                    await client.fine_tuning.jobs.create(**given, **wandb)
                assert caught.value.code == "wandb_not_set_up"
                secret = {"name": "wandb", "value": "0123456789abcdef"}
                assert (await found.http(found.owner).post("/v1/secrets", json=secret)).status_code == 200
                plain = await client.fine_tuning.jobs.create(**given)
                await until(lambda: launcher.trainings() == [plain.id])
                assert "WANDB_API_KEY" not in launcher.environments[-1]
                await client.fine_tuning.jobs.cancel(plain.id)
                launcher.alive.clear()
                await until(lambda: len(receiver.seen) == 1)
                headers, body = receiver.seen[0]
                event = client.webhooks.unwrap(body, headers, secret=made.signing_secret)
                assert (event.type, event.data.id) == ("fine_tuning.job.cancelled", plain.id)
                job = await client.fine_tuning.jobs.create(**given, **wandb)
                write(
                    JobFolder.of(found.api.folder / "jobs", plain.id).ended, {"attempt": 1, "code": 75, "problems": []}
                )
                await until(lambda: launcher.trainings()[-1] == job.id)
                assert launcher.environments[-1]["WANDB_API_KEY"] == "0123456789abcdef"

    asyncio.run(test())


# -- batches


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
        monkeypatch.setattr("dstune.serve.finetuning.batches.worker.unix_time", lambda: made.expires_at + 1)
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
        assert not list((tmp_path / "finetuning" / "batches").iterdir())
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
        Answers(folder / "batch_part" / "output.jsonl").add({"custom_id": "0", "response": {}})
        add("part", "finalizing", request_counts={"total": 3, "completed": 1, "failed": 0})
        add("moved", "in_progress", request_counts={"total": 3, "completed": 1, "failed": 0})
        part, moved = [await ended(client, f"batch_{name}") for name in ("part", "moved")]
        assert (part.status, part.request_counts.completed) == ("expired", 1)
        assert (await client.files.content(part.output_file_id)).text.count("\n") == 1
        assert (moved.status, moved.request_counts.completed) == ("completed", 3)
        await until(lambda: not list(folder.iterdir()))

    run(test, tmp_path, models=["first"])


def test_a_batch_goes_on_behind_a_torn_line(tmp_path):
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


# -- the organization


def test_usage_costs_and_the_audit_log_are_of_the_own_organization(tmp_path):
    async def test(found):
        now = int(time.time())
        with found.api.database.writing.begin() as session:
            for project, tokens in (("proj_default", 100), ("proj_default", 50), ("proj_other", 7)):
                session.add(
                    Usage(
                        project=project, key="k", kind="training", object="ftjob-1", model="m", tokens=tokens,
                        device_seconds=2.0, cost=0.25, created_at=now,
                    )
                )  # fmt: skip
        owner = found.http(found.owner)
        start = {"start_time": str(now - 86_400 * 2)}
        page = (await owner.get("/v1/organization/usage/fine_tuning", params=start)).json()
        assert [len(bucket["results"]) for bucket in page["data"]] == [0, 0, 1]
        result = page["data"][2]["results"][0]
        assert (result["trained_tokens"], result["device_seconds"], result["num_jobs"]) == (150, 4.0, 2)
        first = (await owner.get("/v1/organization/usage/fine_tuning", params=start | {"limit": "1"})).json()
        assert (len(first["data"]), first["has_more"]) == (1, True)
        admin = found.openai(found.owner, admin_api_key=found.owner).admin.organization
        costs = await admin.usage.costs(start_time=now - 3600, group_by=["line_item"])
        assert [(one.amount.value, one.line_item) for one in costs.data[0].results] == [(0.5, "training m")]
        for bad in (
            {},
            {"start_time": "x"},
            start | {"limit": "99"},
            start | {"group_by[]": "user"},
            start | {"end_time": "1"},
            start | {"project_ids[0]": "x"},  # passed over, it would show all projects
        ):
            assert (await owner.get("/v1/organization/costs", params=bad)).status_code == 400
        assert (await owner.get("/v1/fine_tuning/jobs", params={"metadata[]": "x"})).status_code == 400

        client = found.openai()
        file = await client.files.create(file=b"x", purpose="batch")
        await found.openai(found.other).files.create(file=b"x", purpose="batch")
        entries = [one async for one in admin.audit_logs.list(limit=1)]
        assert [(one.type, one.project.id) for one in entries] == [("file.created", "proj_default")]
        assert entries[0].model_extra["file.created"]["id"] == file.id
        assert entries[0].actor.api_key.id
        listed = await owner.get("/v1/organization/audit_logs", params={"event_types[]": "file.deleted"})
        assert listed.json()["data"] == []
        for path in ("audit_logs", "usage/completions", "costs", "usage/fine_tuning"):
            answer = await found.http().get(f"/v1/organization/{path}", params=start)
            assert (answer.status_code, answer.json()["error"]["code"]) == (403, "role")

    run(test, tmp_path)


def test_secrets_are_kept_encrypted(tmp_path):
    async def test(found):
        owner = found.http(found.owner)
        value = "0123456789abcdef"
        assert (await owner.post("/v1/secrets", json={"name": "wandb", "value": value})).status_code == 200
        assert (await owner.post("/v1/secrets", json={"name": "wandb", "value": value[::-1]})).status_code == 200
        listed = (await owner.get("/v1/secrets")).json()["data"]
        assert [one["name"] for one in listed] == ["wandb"] and value not in json.dumps(listed)
        assert (await found.http(found.other).get("/v1/secrets")).json()["data"] == []
        with found.api.database.session() as session:
            sealed = session.query(Secret).one().value
            assert found.api.vault.read(session, "proj_default", "wandb") == value[::-1]
            assert found.api.vault.read(session, "proj_other", "wandb") is None
        assert value[::-1] not in sealed
        assert (tmp_path / "vault-key").stat().st_mode & 0o077 == 0
        (tmp_path / "other").mkdir()
        with pytest.raises(DstuneError, match="another vault-key"):
            Vault(tmp_path / "other").open(sealed)
        assert (await owner.post("/v1/secrets", json={"name": "openai", "value": value})).status_code == 400
        assert (await found.http().get("/v1/secrets")).status_code == 403
        assert (await owner.delete("/v1/secrets/wandb")).json()["deleted"]
        assert (await owner.delete("/v1/secrets/wandb")).status_code == 404

    run(test, tmp_path)


def test_keys_of_projects_and_roles(tmp_path, capsys):
    state = tmp_path / "serving"
    words = ["--organization", "acme", "--state", str(state), "--json"]

    def added(*more: str):
        assert keys_command.main(["add", *more, *words]) == 0
        return Keys(Database.of_folder(state)).find(json.loads(capsys.readouterr().out)["key"])

    one = added("one", "--project", "a", "--role", "read-only")
    two, three = added("two", "--project", "a", "--role", "owner"), added("three", "--project", "b")
    assert (one.role, two.role, three.role) == ("read_only", "owner", "member")
    assert one.project == two.project != three.project
    assert one.organization == two.organization == three.organization
    assert [one.has_role(role) for role in ("read_only", "member", "owner")] == [True, False, False]


def test_the_api_alone_and_the_extra_that_it_needs(monkeypatch):
    def problems(*words: str) -> str:
        own, behind = command._split(list(words))
        arguments = command._parser().parse_args(own)
        arguments.engine_arguments = behind
        with pytest.raises(UserError) as caught:
            command._check(arguments)
        return str(caught.value)

    assert "no model is served with --no-inference" in problems("--no-inference", "runs/a")
    assert "--no-inference" in problems()
    assert "--max-file-bytes" in problems("--no-inference", "--max-file-bytes", "0")
    found = importlib.util.find_spec
    absent = lambda name: None if name == "python_multipart" else found(name)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", absent)
    with pytest.raises(UserError, match=r"python_multipart is missing(.|\n)*dstune\[api\]"):
        extra.require_api()
