"""Webhooks: which addresses they may have, what a receiver is sent, as the official client verifies it."""

from __future__ import annotations

import asyncio
import json

import openai
import pytest

from dstune.finetuning import deliveries as deliveries_module
from dstune.finetuning.addresses import checked_url, is_public
from dstune.finetuning.jobs.build import Parts
from dstune.finetuning.jobs.device_queue import Machine
from dstune.finetuning.jobs.folder import JobFolder, write
from dstune.finetuning.tables import Delivery
from dstune.serve.errors import ApiError
from tests.support.finetuning import cloud
from tests.support.finetuning_calls import run, until
from tests.support.jobs import StubLauncher, StubPlans
from tests.support.serving import listening


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


def test_receivers_that_do_not_answer_keep_nobody_waiting(tmp_path):
    """Of two tenants: one has a hundred events for a receiver that is silent, the other one a single one."""

    async def test(found):
        kinds = ["batch.failed"]
        silent = await found.openai().webhooks.create(name="a", url="https://a.invalid/", event_types=kinds)
        other = await found.openai(found.other).webhooks.create(name="b", url="https://b.invalid/", event_types=kinds)
        with found.api.database.writing.begin() as session:
            for number in range(100):
                found.api.webhooks.enqueue(session, "proj_default", "batch.failed", f"batch_{number}")
            found.api.webhooks.enqueue(session, "proj_other", "batch.failed", "batch_x")
        own = deliveries_module.Deliveries(found.api.database, found.api.webhooks, 1.0)
        claimed = [endpoint.id for _, endpoint in own._claim()]
        assert (claimed.count(silent.id), claimed.count(other.id)) == (4, 1)
        assert len(own._claim()) == 8  # the rest is of one endpoint, which has all places then

    run(test, tmp_path, api={"delivery_seconds": 3600.0})


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


def test_a_finished_job_sends_a_webhook_and_its_processes_get_the_projects_own_key(tmp_path):
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
