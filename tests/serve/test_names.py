"""`dstune serve --alias OLD=NEW`: a model answers under another name, with the rights of the name that is asked."""

from __future__ import annotations

import pytest

from dstune.core.errors import UserError
from dstune.serve import options
from dstune.serve.source import check_aliases, parse_aliases
from tests.support.serving import chat, run

OLD = "ft:gpt-4o-2024-08-06:acme::0"


def test_a_model_answers_under_another_name(tmp_path):
    async def test(server):
        client, other = server.client(), server.client(server.other)  # `other` may use "second" alone
        answer = await client.post("/v1/chat/completions", json=chat("hi", model=OLD))
        assert (answer.status_code, answer.json()["model"]) == (200, "second")
        assert server.app.seen[-1][1]["model"] == "second"  # adapters on one engine are told apart by it
        names = [model["id"] for model in (await client.get("/v1/models")).json()["data"]]
        assert names == ["first", "second", OLD]
        described = (await client.get(f"/v1/models/{OLD}")).json()
        assert (described["id"], described["ready"]) == (OLD, True)
        refused = await other.post("/v1/chat/completions", json=chat("hi", model=OLD))
        assert refused.status_code == 404
        assert (await other.get(f"/v1/models/{OLD}")).status_code == 404
        assert [model["id"] for model in (await other.get("/v1/models")).json()["data"]] == ["second"]
        only_old = server.client(server.gateway.keys.add("three", models=[OLD]))
        assert (await only_old.post("/v1/chat/completions", json=chat("hi", model=OLD))).status_code == 200
        assert (await only_old.post("/v1/chat/completions", json=chat("hi", model="second"))).status_code == 404

    run(test, tmp_path, aliases={OLD: "second"})


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["old"], "no ALIAS=MODEL"),
        (["=first"], "no ALIAS=MODEL"),
        (["old=first", "old=second"], "stands for two models"),
        (["first=second"], "served under this name"),
        (["old=third"], "no model that is served"),
        (["old=older", "older=first"], "no model that is served"),
    ],
)
def test_aliases_that_are_refused(words, reason):
    with pytest.raises(UserError, match=reason):
        check_aliases(parse_aliases(words), ["first", "second"], open_ended=False)


def test_models_that_come_later_may_have_an_alias():
    check_aliases(parse_aliases([f"{OLD}=ft:tiny:acme::abc"]), ["tiny"], open_ended=True)


def test_names_of_jobs_models_are_refused_for_others():
    arguments = options.parsed([f"{OLD}=runs/a", "--fine-tuning"])
    with pytest.raises(UserError, match="names that begin with ft:") as refusal:
        options.check(arguments)
    (problem,) = refusal.value.problems
    assert problem.fix == f"NAME=runs/a --alias {OLD}=NAME"
    options.check(options.parsed([f"{OLD}=runs/a"]))
    options.check(options.parsed([*problem.fix.split(), "--fine-tuning"]))
