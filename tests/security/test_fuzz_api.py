"""Made-up and damaged requests to every route of the fine-tuning API (benchmarks/fuzz_api.py sends many more): group 4 of the
demands on it, errors."""

from __future__ import annotations

import asyncio

from benchmarks.fuzz_api import Answered, Fuzzer
from tests.support.finetuning import cloud


def test_answers_keep_the_contract(tmp_path):
    async def main():
        async with cloud(tmp_path) as found:
            fuzzer = Fuzzer(found.gateway, [found.key, found.owner, found.other, "nothing"], tmp_path, seed=7)
            await fuzzer.run(400)
            assert fuzzer.findings == {}
            assert {200, 400, 401, 403, 404, 405} <= set(fuzzer.statuses), fuzzer.statuses

    asyncio.run(main())


def test_the_fuzzer_sees_what_breaks_the_contract(tmp_path):
    fuzzer = Fuzzer(None, ["sk-key"], tmp_path, seed=0)
    json_head = {"content-type": "application/json", "x-request-id": "req_1"}
    shape = b'{"error": {"message": "m", "type": "t", "param": null, "code": null}}'
    for answered, fault in (
        (Answered(422, json_head, shape), "status"),
        (Answered(500, json_head, shape), "status"),
        (Answered(409, json_head, shape), "a 409 that is repeated"),
        (Answered(400, json_head, b'{"detail": []}'), "detail"),
        (Answered(400, json_head, b'{"error": {"message": "m"}}'), "the shape of an error"),
        (Answered(400, json_head, shape.replace(b'"m"', f'"{tmp_path}"'.encode())), "it tells what it must not"),
        (Answered(200, json_head, b'{"key": "sk-key"}'), "it tells what it must not"),
        (Answered(404, {"x-request-id": "req_1"}, b"Not Found"), "an error that is no JSON"),
        (Answered(200, {"content-type": "application/json"}, b"{}"), "no x-request-id"),
    ):
        assert fault in fuzzer.faults(answered), fault
    assert fuzzer.faults(Answered(400, json_head, shape)) == []
    assert fuzzer.faults(Answered(200, json_head, b"{}")) == []
