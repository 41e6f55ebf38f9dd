"""Usage, costs, the audit log and secrets, with the official client where it knows them."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import re
import time
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest

from dstune.core.errors import DstuneError, UserError
from dstune.finetuning import gateway_routes
from dstune.finetuning.jobs.tables import TunedModel
from dstune.finetuning.models import serving as serving_module
from dstune.finetuning.models.serving import Serving
from dstune.finetuning.routes import routes as routes_of
from dstune.finetuning.tables import Secret, Usage
from dstune.finetuning.vault import Vault
from dstune.serve import command, keys_command, options
from dstune.serve.engines.base import EngineDown
from dstune.serve.store.database import Database
from dstune.serve.store.keys import Keys
from tests.support.finetuning_calls import run


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


class Engines:
    """Of a fleet, what loads models."""

    def __init__(self, monkeypatch):
        where = "dstune.finetuning.models.serving.source.resolve"
        monkeypatch.setattr(where, lambda name, path: SimpleNamespace(name=name))
        self.models, self.loading, self.started = {"base": None}, asyncio.Event(), asyncio.Event()
        self.started.set()
        self.failure = None

    async def add(self, source):
        if self.failure is not None:
            raise self.failure
        self.loading.set()
        await asyncio.sleep(0.01)
        self.models[source.name] = source

    async def remove(self, name):
        del self.models[name]


def test_models_that_nobody_asks_for_leave_their_engine(tmp_path, monkeypatch):
    monkeypatch.setattr(serving_module, "MOST_LOADED", 2)
    engines, rows, clock = Engines(monkeypatch), [], [0.0]
    monkeypatch.setattr(serving_module, "time", SimpleNamespace(monotonic=lambda: clock[0]))

    async def test():
        store = SimpleNamespace(
            final=lambda most: rows,
            folder=lambda model: tmp_path,
            find=lambda caller, name: next(row for row in rows if row.name == name),
        )
        serving, caller = Serving(engines, store), SimpleNamespace(project="p")
        for number in range(4):
            rows.append(TunedModel(name=f"ft:base:org::{number}", folder="a"))
            await serving.load_new()
        assert len(engines.models) == 1 + 4  # all of them were asked for, or made, a moment ago
        clock[0] = 4000.0
        await serving.ensure(caller, rows[0].name)
        rows.append(TunedModel(name="ft:base:org::4", folder="a"))
        for _ in range(2):
            await serving.load_new()
            assert sorted(engines.models) == ["base", rows[0].name, rows[4].name]
        await serving.ensure(caller, rows[2].name)
        assert rows[2].name in engines.models

    asyncio.run(test())


def test_models_are_loaded_before_anybody_asks_also_after_a_restart(tmp_path, monkeypatch):
    """They wait until the engines have been started, and one that an engine could not take at the moment is tried again."""

    async def test():
        engines = Engines(monkeypatch)
        engines.started.clear()
        row = TunedModel(name="ft:base:org::1", folder="a")
        serving = Serving(engines, SimpleNamespace(final=lambda most: [row], folder=lambda model: tmp_path))
        loading = asyncio.create_task(serving.load_new())
        await asyncio.sleep(0.01)
        assert not engines.loading.is_set()
        engines.started.set()
        engines.failure = EngineDown("it restarts")
        await loading
        assert list(engines.models) == ["base"]
        engines.failure = None
        await serving.load_new()
        assert list(engines.models) == ["base", row.name]

    asyncio.run(test())


def test_a_model_that_is_deleted_while_it_is_loaded_does_not_stay_on_its_engine(tmp_path, monkeypatch):
    async def test():
        engines = Engines(monkeypatch)
        row = TunedModel(name="ft:base:org::1", folder="a")
        store = SimpleNamespace(final=lambda most: [row], folder=lambda model: tmp_path)
        serving = Serving(engines, store)
        loading = asyncio.create_task(serving.load_new())
        await engines.loading.wait()
        await serving.forget(row.name)
        await loading
        assert list(engines.models) == ["base"]

    asyncio.run(test())


def test_keys_of_projects_and_roles(tmp_path, capsys):
    state = tmp_path / "serving"
    words = ["--organization", "acme", "--state", str(state), "--json"]

    def added(*more: str):
        assert keys_command.main(["add", *more, *words]) == 0
        return Keys(Database.open_folder(state)).find(json.loads(capsys.readouterr().out)["key"])

    one = added("one", "--project", "a", "--role", "read-only")
    two, three = added("two", "--project", "a", "--role", "owner"), added("three", "--project", "b")
    assert (one.role, two.role, three.role) == ("read_only", "owner", "member")
    assert one.project == two.project != three.project
    assert one.organization == two.organization == three.organization
    assert [one.has_role(role) for role in ("read_only", "member", "owner")] == [True, False, False]


def test_the_api_alone_and_the_extra_that_it_needs(monkeypatch):
    def problems(*words: str) -> str:
        with pytest.raises(UserError) as caught:
            options.check(options.parsed(list(words)))
        return str(caught.value)

    assert "no model is served with --no-inference" in problems("--no-inference", "runs/a")
    assert "--no-inference" in problems()
    assert "--max-file-bytes" in problems("--no-inference", "--max-file-bytes", "0")
    found = importlib.util.find_spec
    absent = lambda name: None if name == "python_multipart" else found(name)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", absent)
    with pytest.raises(UserError, match=r"python_multipart is missing(.|\n)*\.\[api\]"):
        gateway_routes.FineTuningRoutes().open(options.parsed(["--no-inference"]), Path("state"), Path("runtime"))


GRADER = {"type": "string_check", "name": "g", "input": "a", "reference": "a", "operation": "eq"}
EXPIRY = {"anchor": "created_at", "seconds": 3600}
UNKNOWN = (
    ("/v1/uploads", {"part_size": 1}, "part_size"),
    (
        "/v1/uploads",
        {
            "filename": "a",
            "purpose": "batch",
            "bytes": 1,
            "mime_type": "text/plain",
            "expires_after": EXPIRY | {"second": 1},
        },
        "expires_after.second",
    ),
    ("/v1/uploads/u/complete", {"part_id": []}, "part_id"),
    ("/v1/uploads/u/cancel", {"x": 1}, "x"),
    ("/v1/batches", {"input_file": "file-a"}, "input_file"),
    (
        "/v1/batches",
        {
            "input_file_id": "file-a",
            "endpoint": "/v1/completions",
            "completion_window": "24h",
            "output_expires_after": EXPIRY | {"x": 1},
        },
        "output_expires_after.x",
    ),
    ("/v1/batches/b/cancel", {"x": 1}, "x"),
    ("/v1/webhook_endpoints", {"secret": "x"}, "secret"),
    ("/v1/webhook_endpoints/w", {"events": []}, "events"),
    ("/v1/webhook_endpoints/w/test", {"event": "x"}, "event"),
    ("/v1/webhook_endpoints/w/rotate_secret", {"secret": "x"}, "secret"),
    ("/v1/secrets", {"project": "p"}, "project"),
    ("/v1/fine_tuning/checkpoints/ft:a:b:c:d/permissions", {"project_id": "p"}, "project_id"),
    ("/v1/fine_tuning/alpha/graders/validate", {"graders": GRADER}, "graders"),
    (
        "/v1/fine_tuning/alpha/graders/run",
        {"grader": GRADER | {"threshold": 1}, "model_sample": ""},
        "grader.threshold",
    ),
)


def test_no_field_of_any_body_is_dropped_silently(tmp_path):
    async def test(found):
        owner = found.http(found.owner)
        for path, body, param in UNKNOWN:
            answer = await owner.post(path, json=body)
            error = answer.json()["error"]
            assert (answer.status_code, error["param"], error["code"]) == (400, param, "unknown_parameter"), (
                path,
                error,
            )

    run(test, tmp_path, models=("base",))


def test_the_routes_of_the_finetuning_api_are_opened_by_a_switch():
    assert not options.parsed(["m"]).fine_tuning
    for words in (["m", "--presets", "x.yaml"], ["m", "--jobs", "elsewhere"]):
        with pytest.raises(UserError, match="--fine-tuning"):
            command.main(words)


def test_every_route_is_in_the_documentation():
    text = (Path(__file__).parents[2] / "docs" / "serving.md").read_text()
    named = set(re.findall(r"/[\w/.-]*[\w]", text))
    for route in routes_of(MagicMock()):
        path = route.path.partition("{")[0].rstrip("/")
        assert any(one == path or one.startswith(f"{path}/") for one in named), route.path
