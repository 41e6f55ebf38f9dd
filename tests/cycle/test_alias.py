"""A server whose alias shares its requests among versions."""

from __future__ import annotations

from pathlib import Path

from dstune.cycle.registry import Registry
from dstune.serve import options
from tests.support.serving import chat, run


def test_an_alias_is_a_model_whose_versions_share_the_requests(tmp_path: Path) -> None:
    folder = tmp_path / "cycle"
    folder.mkdir()
    registry = Registry.read(folder)
    registry.versions = {"first": {"status": "current", "cycle": 0}, "second": {"status": "challenger", "cycle": 1}}
    registry.share("live", 0.5)
    registry.write()
    arguments = options.parsed(["first=x", "--aliases", str(folder)])
    (service,) = (service for service in options.served(arguments) if service.name == "aliases")
    assert not list(service.check(arguments))
    service.open(arguments, tmp_path, tmp_path)

    async def test(found) -> None:
        found.gateway.add_routes(service.routes(found.gateway))
        service.attach(found.gateway)
        client = found.client()
        versions = {}
        for number in range(20):
            answer = await client.post("/v1/chat/completions", json=chat("hi", model="live", user=f"u{number}"))
            assert answer.status_code == 200, answer.text
            versions[number] = answer.json()["model"]
        assert set(versions.values()) == {"first", "second"}
        again = await client.post("/v1/chat/completions", json=chat("other", model="live", user="u3"))
        assert again.json()["model"] == versions[3]  # a user stays with a version
        assert (await client.get("/v1/aliases")).json()["data"][0]["versions"] == {"first": 0.5, "second": 0.5}
        # A key that may use "second" alone may not reach it by the alias, nor "first".
        assert (
            await found.client(found.other).post("/v1/chat/completions", json=chat("a", model="live"))
        ).status_code == 404
        registry.promote("live")
        registry.write()
        for number in range(10):
            answer = await client.post("/v1/chat/completions", json=chat("hi", model="live", user=f"u{number}"))
            assert answer.json()["model"] == "second"

    state = tmp_path / "state"
    state.mkdir()
    run(test, state)
    assert list(service.check(options.parsed(["first=x", "--aliases", str(tmp_path)])))
