"""What `DELETE /admin/users/NAME` and `--log-days` leave of logged requests."""

from __future__ import annotations

import argparse
import asyncio
import os
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from dstune.serve import command
from dstune.serve.gateway.recording import Recorder
from dstune.serve.gateway.request_log import RequestLog
from dstune.serve.store.database import Database
from tests.support.serving import chat, served


def log_of_an_earlier_start(state: Path) -> RequestLog:
    log = RequestLog(state / "requests", str)
    for number, user in enumerate(("alice", "bob")):
        names = {"id": f"req_{number}", "response": None, "created": None, "key": "k", "model": "m", "version": "v"}
        log.add({**names, "user": user, "status": 200}, "/v1", {"user": user}, b"{}")
    log.flush(now=True)
    return log


def left(state: Path) -> list[str]:
    return [row["user"] for file in (state / "requests").glob("*.parquet") for row in pq.read_table(file).to_pylist()]


@pytest.mark.parametrize("what", ["forgotten", "retention"])
def test_a_start_without_the_log_deletes_what_an_earlier_one_logged(what: str, tmp_path: Path) -> None:
    log_of_an_earlier_start(tmp_path)
    request_log = command._request_log(argparse.Namespace(log_requests=False, log_days=30.0), tmp_path)
    recorder = Recorder(Database.open_folder(tmp_path), request_log, logs=False)
    if what == "forgotten":
        asyncio.run(recorder.forget("alice"))
        assert left(tmp_path) == ["bob"]
        return
    for file in (tmp_path / "requests").glob("*.parquet"):
        os.utime(file, (time.time() - 31 * 86400,) * 2)
    asyncio.run(recorder.stop())
    assert left(tmp_path) == []


def test_a_start_without_the_log_adds_nothing_to_it(tmp_path: Path) -> None:
    log = log_of_an_earlier_start(tmp_path)
    recorder = Recorder(Database.open_folder(tmp_path), log, logs=False)
    with recorder.answer(_request(), {"messages": []}) as record:
        record.take(b"text")
    asyncio.run(recorder.stop())
    assert left(tmp_path) == ["alice", "bob"] and not record.text


def _request() -> Any:
    names = {"id": "req_9", "model": "m", "version": "v", "end_user": "alice", "safety_identifier": None}
    key = argparse.Namespace(id="k")
    return argparse.Namespace(**names, key=key, status=200, began=time.monotonic(), path="/v1", body_bytes=1)


@pytest.mark.parametrize("name", ["alice", "hash-of-alice"])
def test_either_name_of_a_user_deletes_the_rows(name: str, tmp_path: Path) -> None:
    async def test() -> int:
        (tmp_path / "state").mkdir(mode=0o700)
        async with served(tmp_path / "state", log=RequestLog(tmp_path / "requests", str)) as found:
            client, admin = found.client(), found.client(found.admin)
            body = chat("a", user="alice") | {"safety_identifier": "hash-of-alice"}
            assert (await client.post("/v1/chat/completions", json=body)).is_success
            assert (await client.post("/v1/chat/completions", json=chat("a", user="bob"))).is_success
            return int((await admin.delete(f"/admin/users/{name}")).json()["answers"])

    assert asyncio.run(test()) == 1
    assert left(tmp_path) == ["bob"]
