"""`/v1/fine_tuning/jobs` and tuned models by the official client, over a launcher that starts nothing.

Groups 1 (the whole path, strict client), 2 (pages), 3 (repeated creates), 4 (errors), 6 (every wish in every state), 7 (tenants)
and 8 (text) of the demands on the API, as far as jobs and models go.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from typing import Any

import openai
import pytest
from openai.types.fine_tuning.job_create_params import IntegrationWandb, JobCreateParams

from dstune.finetuning.jobs.planner import Estimate
from dstune.serve.store.tables import Project
from tests.support.dropping import Dropping
from tests.support.offices import PRESETS, ROW, ROWS, Office, in_office


@pytest.mark.parametrize("strict", [False, True], ids=["plain", "strict"])
def test_a_job_and_its_models(tmp_path, strict):
    async def test(found: Office) -> None:
        client = found.cloud.openai(found.cloud.owner, _strict_response_validation=strict)
        job = await found.succeeded(client, suffix="x", metadata={"k": "v"}, seed=3)
        assert (job.object, job.trained_tokens, job.seed, job.error) == ("fine_tuning.job", 80, 3, None)
        assert (job.hyperparameters.n_epochs, job.hyperparameters.learning_rate_multiplier) == (2, 1.0)
        assert job.method.supervised.hyperparameters.batch_size == 3
        assert job.organization_id == "org-default"
        assert job.finished_at >= job.created_at
        assert job.estimated_finish is None
        events = [event async for event in client.fine_tuning.jobs.list_events(job.id, limit=2)]
        assert [event.data["step"] for event in events if event.type == "metrics"] == list(range(8, 0, -1))
        checkpoints = [one async for one in client.fine_tuning.jobs.checkpoints.list(job.id)]
        assert [(one.step_number, one.metrics.train_loss) for one in checkpoints] == [(8, 0.125), (4, 0.25)]
        content = await client.files.content(job.result_files[0])
        assert content.read().decode().splitlines()[8] == "8,0.125,,,"
        results = await client.files.retrieve(job.result_files[0])
        assert results.filename == "step_metrics.csv"
        name = job.fine_tuned_model
        listed = [model.id async for model in client.models.list()]
        assert listed == ["tiny", "other", checkpoints[1].fine_tuned_model_checkpoint, name]
        assert (await client.models.retrieve(name)).owned_by == "org-default"
        with pytest.raises(openai.PermissionDeniedError):
            await client.models.delete("tiny")
        with pytest.raises(openai.PermissionDeniedError):
            await found.cloud.openai().models.delete(name)  # a member
        assert (await client.models.delete(name)).deleted
        assert (await client.models.delete(name, extra_headers={"x-stainless-retry-count": "1"})).deleted
        for ask in (client.models.retrieve, client.models.delete):
            with pytest.raises(openai.NotFoundError):
                await ask(name)
        assert [model.id async for model in client.models.list()] == listed[:3]

    in_office(tmp_path, test)


def test_who_may_see_and_share_a_model(tmp_path):
    async def test(found: Office) -> None:
        owner, other = found.cloud.openai(found.cloud.owner), found.cloud.openai(found.cloud.other)
        with found.cloud.api.database.writing.begin() as session:
            session.add(Project(id="proj_second", organization="org-default", name="second", created_at=1))
        second = found.cloud.openai(found.cloud.gateway.keys.add("second", project="proj_second"))
        job = await found.succeeded(owner)
        name = job.fine_tuned_model
        for foreign in (other, second):
            for ask in (
                lambda c: c.fine_tuning.jobs.retrieve(job.id),
                lambda c: c.fine_tuning.jobs.cancel(job.id),
                lambda c: c.fine_tuning.jobs.list_events(job.id),
                lambda c: c.fine_tuning.jobs.checkpoints.list(job.id),
                lambda c: c.models.retrieve(name),
                lambda c: c.files.content(job.result_files[0]),
            ):
                with pytest.raises(openai.NotFoundError):
                    await ask(foreign)
            assert [one async for one in foreign.fine_tuning.jobs.list()] == []
            assert name not in [model.id async for model in foreign.models.list()]
        permissions = owner.fine_tuning.checkpoints.permissions
        with pytest.raises(openai.BadRequestError, match="proj_other"):  # of another organization
            await _first(permissions.create(name, project_ids=["proj_other"]))
        made = await _first(permissions.create(name, project_ids=["proj_second"]))
        assert made.project_id == "proj_second"
        again = await _first(permissions.create(name, project_ids=["proj_second"]))
        assert again.id == made.id
        assert (await second.models.retrieve(name)).id == name
        with pytest.raises(openai.PermissionDeniedError):
            await second.models.delete(name)
        raw = found.cloud.http(found.cloud.owner, **{"content-type": "application/json"})
        path = f"/v1/fine_tuning/checkpoints/{name}/permissions"
        assert (await raw.post(path, content=rb'{"project_ids": ["\ud800"]}')).status_code == 400
        listed = [one async for one in permissions.list(name)]
        assert [one.id for one in listed] == [made.id]
        assert (await permissions.delete(made.id, fine_tuned_model_checkpoint=name)).deleted
        with pytest.raises(openai.NotFoundError):
            await second.models.retrieve(name)

    in_office(tmp_path, test)


async def _first(pages: Any) -> Any:
    async for one in pages:
        return one
    raise AssertionError("an empty list")


@pytest.mark.ci
def test_pages_of_jobs_and_events_while_new_ones_arrive(tmp_path):
    async def test(found: Office) -> None:
        client = found.cloud.openai()
        file = await found.file(client)
        given = {
            "training_file": file,
            "hyperparameters": {"n_epochs": 12, "batch_size": 3},
            "metadata": {"a b": "ü&="},
        }
        made = [(await found.create(client, **given)).id for _ in range(25)]
        seen = []
        async for job in client.fine_tuning.jobs.list(limit=2, metadata={"a b": "ü&="}):
            seen.append(job.id)
            if len(seen) % 4 == 2:
                await found.create(client, **given)
        assert seen == made[::-1]
        first = await found.reach(client, made[0], "running")
        found.train(first.id, 41)
        jobs = client.fine_tuning.jobs
        while len([event async for event in jobs.list_events(first.id, limit=100)]) < 45:
            await asyncio.sleep(0.05)
        told, pages = [], 0
        page = await jobs.list_events(first.id)
        while page.data:
            told, pages = told + page.data, pages + 1
            if pages == 1:
                await jobs.pause(first.id)  # one more event, in front
            if not page.has_next_page():
                break
            page = await page.get_next_page()
        assert (len(told), len({event.id for event in told}), pages) == (45, 45, 3)
        assert [event.data["step"] for event in told if event.type == "metrics"] == list(range(41, 0, -1))
        bare = await found.create(client, training_file=file)
        plain = [job.id async for job in client.fine_tuning.jobs.list(extra_query={"metadata": "null"})]
        assert plain == [bare.id]
        for wrong in ({"limit": 0}, {"limit": 101}, {"after": "ftjob-x"}, {"extra_query": {"order": "asc"}}):
            with pytest.raises(openai.BadRequestError):
                await client.fine_tuning.jobs.list(**wrong)

    in_office(tmp_path, test)


GRADER = {"type": "string_check", "name": "g", "operation": "eq", "input": "{{sample.output_text}}", "reference": "x"}


def test_what_a_create_is_refused_for(tmp_path):
    async def test(found: Office) -> None:
        client = found.cloud.openai()
        file = await found.file(client)
        other = (await client.files.create(file=("a.jsonl", b"{}\n"), purpose="batch")).id
        theirs = await found.file(found.cloud.openai(found.cloud.other))
        for given, param, code in (
            ({"model": "gpt-4o-mini"}, "model", "model_not_available"),
            ({"model": "ft:tiny:other::abcdefgh"}, "model", "model_not_available"),
            ({"model": "other"}, "method.type", "unsupported"),
            ({"method": {"type": "reinforcement", "reinforcement": {"grader": GRADER}}}, "method.type", "unsupported"),
            ({"training_file": other}, "training_file", "invalid_file_purpose"),
            ({"integrations": [{"type": "wandb", "wandb": {"project": "p"}}]}, "integrations", "wandb_not_set_up"),
        ):
            with pytest.raises(openai.BadRequestError) as caught:
                await found.create(client, **{"training_file": file, **given})
            assert (caught.value.param, caught.value.code) == (param, code)
            assert caught.value.request_id.startswith("req_")
        for missing in ("file-nothing", theirs, "../../etc/passwd"):
            with pytest.raises(openai.NotFoundError) as caught:
                await found.create(client, training_file=missing)
            assert caught.value.param == "training_file"
        limited = found.cloud.openai(found.cloud.gateway.keys.add("limited", models=["other"]))
        with pytest.raises(openai.BadRequestError, match="this server has other") as caught:
            await found.create(limited, training_file=file)
        assert caught.value.code == "model_not_available"
        presets = found.cloud.folder / "models.yaml"
        presets.write_text(json.dumps({"models": {"tiny": {"path": "base", "devices": 3}}}))
        with pytest.raises(openai.BadRequestError, match="needs 3 devices, and this server has 2") as caught:
            await found.create(client, training_file=file)
        assert caught.value.code == "job_does_not_fit"
        presets.write_text(json.dumps(PRESETS))
        found.plans.estimate = Estimate(fits=False, reason="a rank needs 300.0 GiB at least, and H100 has 80.0 GiB")
        with pytest.raises(openai.BadRequestError, match=r"300.0 GiB") as caught:
            await found.create(client, training_file=file)
        assert caught.value.code == "job_does_not_fit"
        reader = found.cloud.openai(found.cloud.reader)
        with pytest.raises(openai.PermissionDeniedError):
            await found.create(reader, training_file=file)
        with pytest.raises(openai.NotFoundError) as caught:
            await client.fine_tuning.jobs.retrieve("ftjob-x")
        assert (caught.value.param, caught.value.code) == ("fine_tune_id", "fine_tune_not_found")
        assert list((found.cloud.api.folder / "jobs").iterdir()) == []  # nothing is left of what was refused

    in_office(tmp_path, test)


UNKNOWN_FIELDS = (
    ({"n_epochs": 5}, "n_epochs", "method.supervised.hyperparameters.n_epochs"),
    ({"epochs": 5}, "epochs", "method.supervised.hyperparameters.n_epochs"),
    ({"beta": 0.1}, "beta", "method.dpo.hyperparameters.beta"),
    ({"n_epochs": 5, "method": {"type": "dpo"}}, "n_epochs", "method.dpo.hyperparameters.n_epochs"),
    ({"lora": {"r": 8}}, "lora", "training_file"),
    ({"entity": "e"}, "entity", "integrations.0.wandb.entity"),
    ({"hyperparameters": {"epochs": 1}}, "hyperparameters.epochs", "hyperparameters.n_epochs"),
    ({"hyperparameters": {"beta": 1}}, "hyperparameters.beta", "method.dpo.hyperparameters.beta"),
    ({"method": {"type": "dpo", "n_epochs": 1}}, "method.n_epochs", "method.dpo.hyperparameters.n_epochs"),
    ({"method": {"type": "dpo", "x": None}}, "method.x", "dpo"),
    (
        {"method": {"type": "supervised", "supervised": {"batch_size": 1}}},
        "method.supervised.batch_size",
        "method.supervised.hyperparameters.batch_size",
    ),
    (
        {"integrations": [{"type": "wandb", "wandb": {"project": "p"}, "tags": ["a"]}]},
        "integrations.0.tags",
        "integrations.0.wandb.tags",
    ),
    (
        {"integrations": [{"type": "wandb", "wandb": {"project": "p", "mode": "online"}}]},
        "integrations.0.wandb.mode",
        "project",
    ),
)


def test_no_field_of_a_job_is_dropped_silently(tmp_path):
    """A setting that the job would not use is refused with the place where it belongs."""

    async def test(found: Office) -> None:
        client = found.cloud.openai()
        file = await found.file(client)
        for fields, param, place in UNKNOWN_FIELDS:
            with pytest.raises(openai.BadRequestError) as caught:
                await found.create(client, training_file=file, extra_body=fields)
            assert (caught.value.param, caught.value.code) == (param, "unknown_parameter"), fields
            assert place in caught.value.message, caught.value.message
        for fields, param in (
            ({"metadata": {"a": {"b": 1}}}, "metadata.a"),
            ({"metadata": ["a"]}, "metadata"),
            ({"integrations": {"type": "wandb"}}, "integrations"),
            ({"hyperparameters": [5]}, "hyperparameters"),
        ):
            with pytest.raises(openai.BadRequestError) as caught:
                await found.create(client, training_file=file, extra_body=fields)
            assert caught.value.param == param
        assert [job async for job in client.fine_tuning.jobs.list()] == []

    in_office(tmp_path, test)


def test_all_that_the_official_client_can_send_is_accepted(tmp_path):
    supervised: Any = {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2, "batch_size": "auto"}}}
    wandb: Any = {"type": "wandb", "wandb": {"project": "p", "name": None, "entity": "e", "tags": ["a"]}}
    given = {
        "suffix": "s", "seed": 1, "metadata": {"a": "b"}, "integrations": [wandb], "method": supervised,
        "hyperparameters": {"n_epochs": 2, "batch_size": "auto", "learning_rate_multiplier": "auto"},
    }  # fmt: skip
    assert {*given, "model", "training_file", "validation_file"} == set(JobCreateParams.__annotations__)
    assert set(wandb["wandb"]) == set(IntegrationWandb.__annotations__)

    async def test(found: Office) -> None:
        owner = found.cloud.openai(found.cloud.owner)
        await owner.post("/secrets", cast_to=object, body={"name": "wandb", "value": "0123456789abcdef"})
        job = await found.create(owner, validation_file=await found.file(owner), **given)
        assert job.method.supervised.hyperparameters.n_epochs == 2
        nothing = dict.fromkeys(("suffix", "seed", "metadata", "integrations", "validation_file"))
        assert (await found.create(owner, hyperparameters={"n_epochs": 3}, **nothing)).hyperparameters.n_epochs == 3
        for method in ("cancel", "pause", "resume"):
            with pytest.raises(openai.BadRequestError) as caught:
                await getattr(owner.fine_tuning.jobs, method)(job.id, extra_body={"step": 3})
            assert caught.value.param == "step"
        assert (await owner.fine_tuning.jobs.cancel(job.id, extra_body={})).status == "cancelled"

    in_office(tmp_path, test)


HOSTILE = ("${oc.env:HOME}", "../../x", "a'\"\n; rm -rf /", "‮emoji 🎉", "{{ 7*7 }}", "a/b:c.d%2F" + "🎉" * 54)


@pytest.mark.parametrize("text", HOSTILE)
def test_text_of_a_request_stays_text(tmp_path, text):
    """It comes back as it was given, and is in no file and no argument of the job."""

    async def test(found: Office) -> None:
        client = found.cloud.openai()
        job = await found.create(client, suffix=text, metadata={text: text})
        assert (job.user_provided_suffix, job.metadata) == (text, {text: text})
        await found.reach(client, job.id, "running")
        for path in found.folder(job.id).path.rglob("*"):
            if path.is_file():
                assert text.encode() not in path.read_bytes()
        assert text not in json.dumps(found.launcher.started, ensure_ascii=False)

    in_office(tmp_path, test)


def test_names_of_models_that_nobody_has(tmp_path):
    """Slashes, encoded or not, colons and dots: no route is missed, and nothing is found under them."""

    async def test(found: Office) -> None:
        client, owner = found.cloud.openai(), found.cloud.openai(found.cloud.owner)
        file = await found.file(client)
        raw = found.cloud.http(found.cloud.owner)
        for name in (
            "a/b",
            "a:b",
            "ft:a/b:org::id",
            "ft:tiny:default:a.b:ckpt-step-1",
            "%2F",
            "../tiny",
            "ft:tiny/../x",
        ):
            with pytest.raises(openai.BadRequestError) as caught:
                await client.fine_tuning.jobs.create(model=name, training_file=file)
            assert (caught.value.code, caught.value.param) == ("model_not_available", "model")
            for call in (
                client.models.retrieve,
                owner.models.delete,
                owner.fine_tuning.checkpoints.permissions.retrieve,
            ):
                with pytest.raises(openai.NotFoundError) as absent:
                    await call(name)
                assert absent.value.code == "model_not_found", (name, call)
            plain = await raw.get(f"/v1/models/ft:a/b:{name}")  # as 1.109.1 sends it
            assert (plain.status_code, plain.json()["error"]["code"]) == (404, "model_not_found")
        assert (await client.models.retrieve("tiny")).id == "tiny"

    in_office(tmp_path, test)


def test_a_repeated_create_makes_one_job(tmp_path):
    async def test(found: Office) -> None:
        client = found.cloud.openai()
        file = await found.file(client)
        given = {"model": "tiny", "training_file": file}
        key = {"Idempotency-Key": "one"}
        first = await client.fine_tuning.jobs.create(**given, extra_headers=key)
        assert (await client.fine_tuning.jobs.create(**given, extra_headers=key)).id == first.id
        with pytest.raises(openai.BadRequestError) as caught:
            await client.fine_tuning.jobs.create(**given, seed=1, extra_headers=key)
        assert caught.value.code == "idempotency_key_reused"
        wanted = [(await client.fine_tuning.jobs.create(**given)).id for _ in range(2)]
        assert len({*wanted, first.id}) == 3  # on purpose
        again = await client.fine_tuning.jobs.create(**given, extra_headers={"x-stainless-retry-count": "1"})
        assert again.id == wanted[-1]
        impatient = found.cloud.openai(max_retries=2, timeout=0.4)
        slow, files, usual = [0], found.cloud.api.files, found.cloud.api.files.snapshot

        def snapshot(*named: Any) -> Any:
            import time

            slow[0] += 1
            time.sleep(1.0)
            return usual(*named)

        files.snapshot = snapshot  # type: ignore[method-assign]
        with contextlib.suppress(openai.APITimeoutError):
            await impatient.fine_tuning.jobs.create(**given, metadata={"slow": "yes"})
        assert slow[0] > 1
        await asyncio.sleep(1.5)
        files.snapshot = usual  # type: ignore[method-assign]
        assert len([job async for job in client.fine_tuning.jobs.list(metadata={"slow": "yes"})]) == 1

    in_office(tmp_path, test)


@pytest.mark.ci
def test_answers_that_are_lost_make_nothing_twice(tmp_path):
    """The client's own repetitions, through a proxy that drops two answers to each request: uploads, creates, changes."""

    async def test(found: Office) -> None:
        proxy = Dropping(found.cloud.url, drops=2)
        async with proxy as url:
            client = found.cloud.openai(base_url=f"{url}/v1", max_retries=2)
            file = await found.file(client)
            job = await found.create(client, training_file=file)
            assert proxy.dropped == 4
            assert [one.id async for one in client.fine_tuning.jobs.list()] == [job.id]
            assert [one.id async for one in client.files.list()] == [file]
            await found.reach(client, job.id, "running")
            found.train(job.id, 3)
            assert (await client.fine_tuning.jobs.pause(job.id)).status == "pausing"
            found.finish(job.id, 75, exports=(3,))
            await found.reach(client, job.id, "paused")
            assert (await client.fine_tuning.jobs.resume(job.id)).status in ("queued", "running")
            assert (await client.fine_tuning.jobs.cancel(job.id)).status == "cancelled"
            events = [event.message async for event in client.fine_tuning.jobs.list_events(job.id)]
            for once in ("The job is resumed", "The job was cancelled", "A pause was asked for"):
                assert events.count(once) == 1
            assert proxy.dropped == 10
        found.launcher.alive.clear()

    in_office(tmp_path, test)


def test_cancel_pause_and_resume_in_every_state(tmp_path):
    async def test(found: Office) -> None:
        client = found.cloud.openai()
        jobs = client.fine_tuning.jobs
        first = await found.create(client)
        second = await found.create(client)
        await found.reach(client, first.id, "running")
        await found.reach(client, second.id, "queued")
        assert (await jobs.pause(second.id)).status == "paused"
        assert (await jobs.pause(second.id)).status == "paused"
        assert (await jobs.resume(second.id)).status == "queued"
        with pytest.raises(openai.BadRequestError, match="queued"):
            await jobs.resume(second.id)
        repeated = await jobs.resume(second.id, extra_headers={"x-stainless-retry-count": "1"})
        assert repeated.status == "queued"
        found.train(first.id, 3)
        assert (await jobs.pause(first.id)).status == "pausing"
        with pytest.raises(openai.BadRequestError, match="pausing"):
            await jobs.resume(first.id)
        found.finish(first.id, 75, exports=(3,))
        await found.reach(client, first.id, "paused")
        assert [one.step_number async for one in jobs.checkpoints.list(first.id)] == [3]
        await found.reach(client, second.id, "running")
        assert (await jobs.cancel(second.id)).status == "cancelled"
        assert (await jobs.cancel(second.id)).status == "cancelled"
        found.launcher.alive.discard(second.id)
        assert (await jobs.cancel(first.id)).status == "cancelled"
        third = await found.create(client)
        await jobs.cancel(third.id)
        with pytest.raises(openai.BadRequestError, match="cancelled"):
            await jobs.pause(third.id)
        await found.reach(client, third.id, "cancelled")
        fourth = await found.succeeded(client)
        for ask in (jobs.cancel, jobs.pause, jobs.resume):
            with pytest.raises(openai.BadRequestError, match="succeeded"):
                await ask(fourth.id)

    in_office(tmp_path, test, devices=1)


def test_what_was_done_to_a_job_and_what_it_used_is_on_record(tmp_path):
    """Also of one that is cancelled, whose process takes a moment to end."""

    async def test(found: Office) -> None:
        client = found.cloud.openai()
        job = await found.create(client)
        await found.reach(client, job.id, "running")
        await client.fine_tuning.jobs.pause(job.id)
        found.finish(job.id, 75, exports=())
        await found.reach(client, job.id, "paused")
        await client.fine_tuning.jobs.resume(job.id)
        await found.reach(client, job.id, "running")
        await client.fine_tuning.jobs.cancel(job.id)
        await client.fine_tuning.jobs.cancel(job.id)
        found.launcher.alive.discard(job.id)
        owner = found.cloud.http(found.cloud.owner)

        async def used() -> list[Any]:
            start = job.created_at // 86_400 * 86_400
            page = await owner.get(f"/v1/organization/usage/fine_tuning?start_time={start}")
            return [result for bucket in page.json()["data"] for result in bucket["results"]]

        for _ in range(300):
            if results := await used():
                break
            await asyncio.sleep(0.02)
        assert [(one["num_jobs"], one["trained_tokens"]) for one in results] == [(1, 0)]
        assert results[0]["device_seconds"] > 0
        entries = (await owner.get("/v1/organization/audit_logs")).json()["data"]
        kinds = [entry["type"] for entry in entries if entry["type"].startswith("fine_tuning")][::-1]
        assert kinds == [f"fine_tuning.job.{word}" for word in ("created", "paused", "resumed", "cancelled")]

    in_office(tmp_path, test)


def test_the_validation_of_a_cancelled_job_ends(tmp_path):
    async def test(found: Office) -> None:
        found.launcher.validates = False
        client = found.cloud.openai()
        job = await found.create(client)
        assert (await client.fine_tuning.jobs.cancel(job.id)).status == "cancelled"
        assert found.folder(job.id).stop_requested() == "now"

    in_office(tmp_path, test)


def test_a_create_is_answered_before_its_plan(tmp_path):
    async def test(found: Office) -> None:
        client, found.plans.estimate = found.cloud.openai(), None
        first, second = [await found.create(client) for _ in range(2)]
        assert first.status == second.status == "validating_files"
        while not found.folder(second.id).validated.exists():
            await asyncio.sleep(0.02)
        await asyncio.sleep(1.2)  # the loop has looked at them again
        assert (await client.fine_tuning.jobs.retrieve(second.id)).status == "validating_files"
        await client.fine_tuning.jobs.cancel(first.id)
        found.plans.estimate = Estimate(fits=False, reason="a rank needs 300.0 GiB at least, and H100 has 80.0 GiB")
        failed = await found.reach(client, second.id, "failed")
        assert (failed.error.code, failed.error.param) == ("job_does_not_fit", "model")
        assert "300.0 GiB" in failed.error.message
        assert (await client.fine_tuning.jobs.retrieve(first.id)).status == "cancelled"

    in_office(tmp_path, test)


def test_creates_that_wait_for_the_disk_hold_up_nothing_else(tmp_path):
    async def test(found: Office) -> None:
        client, files, usual = found.cloud.openai(), found.cloud.api.files, found.cloud.api.files.snapshot
        file = await found.file(client)
        go = threading.Event()
        files.snapshot = lambda *named: go.wait(30) and usual(*named)  # type: ignore[method-assign]
        waiting = [asyncio.create_task(found.create(client, training_file=file)) for _ in range(40)]
        await asyncio.sleep(0.3)
        async with asyncio.timeout(10):
            assert (await client.files.retrieve(file)).id == file
        assert not any(task.done() for task in waiting)
        go.set()
        assert len({job.id for job in await asyncio.gather(*waiting)}) == 40

    in_office(tmp_path, test)


def test_too_many_jobs_that_wait_are_refused(tmp_path):
    async def test(found: Office) -> None:
        presets = found.cloud.folder / "models.yaml"
        presets.write_text(json.dumps({**PRESETS, "queue": {"key": {"waiting": 2}}}))
        client = found.cloud.openai()
        file = await found.file(client)
        running = await found.create(client, training_file=file)
        await found.reach(client, running.id, "running")
        first, _ = [await found.create(client, training_file=file) for _ in range(2)]
        with pytest.raises(openai.RateLimitError) as caught:
            await found.create(client, training_file=file)
        assert caught.value.response.headers["x-should-retry"] == "false"
        # A paused job is not over: it makes no place for another one, and may go on.
        await found.reach(client, first.id, "queued")
        await client.fine_tuning.jobs.pause(first.id)
        with pytest.raises(openai.RateLimitError):
            await found.create(client, training_file=file)
        assert (await client.fine_tuning.jobs.resume(first.id)).status == "queued"
        await client.fine_tuning.jobs.cancel(first.id)
        await found.create(client, training_file=file)

    in_office(tmp_path, test, devices=1)


def test_a_training_file_may_be_deleted_under_its_job(tmp_path):
    async def test(found: Office) -> None:
        client = found.cloud.openai()
        file = await found.file(client)
        job = await found.create(client, training_file=file)
        await client.files.delete(file)
        await found.reach(client, job.id, "running")
        assert found.folder(job.id).snapshot("training_file").read_bytes() == (ROW * ROWS).encode()

    in_office(tmp_path, test)
