"""Keys, the database, the log of requests, and what of it is on the disk."""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import json
import os
import socket
import sqlite3
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import event
from sqlalchemy.exc import IntegrityError

from dstune.core.errors import UserError
from dstune.serve import keys_command
from dstune.serve.gateway.request_log import RequestLog, answer_value
from dstune.serve.state import MARK, state_folder
from dstune.serve.store.database import DATABASE, Database, now
from dstune.serve.store.keys import Keys
from dstune.serve.store.tables import AnswerRow, Feedback, Table
from tests.support.postgres import postgres
from tests.support.serving import chat, served


def keys(*words: object) -> None:
    assert keys_command.main(list(map(str, words))) == 0


def refusal(*words: object) -> str:
    with pytest.raises(UserError) as caught:
        keys_command.main(list(map(str, words)))
    return str(caught.value)


def test_keys_are_added_listed_and_revoked(tmp_path, capsys):
    state = tmp_path / "serving"
    keys("add", "mobile", "--models", "a, b,", "--requests-per-minute", 5, "--state", state, "--json")
    key = json.loads(capsys.readouterr().out)["key"]
    caller = Keys(Database.open_folder(state)).find(key)
    assert (caller.name, caller.admin, caller.models, caller.limit.requests_per_minute) == (
        "mobile",
        False,
        {"a", "b"},
        5,
    )
    assert "names no model" in refusal("add", "x", "--models", " ,", "--state", state)
    assert "an admin is an owner" in refusal("add", "x", "--admin", "--role", "read-only", "--state", state)
    assert "a key has this name already" in refusal("add", "mobile", "--state", state)
    keys("list", "--state", state, "--json")
    row = json.loads(capsys.readouterr().out)
    assert (row["name"], row["revoked"]) == ("mobile", False)
    assert key not in json.dumps(row)
    keys("revoke", "mobile", "--state", state)
    assert Keys(Database.open_folder(state)).find(key) is None
    assert "there is no such key" in refusal("revoke", "mobile", "--state", state)
    keys("add", "mobile", "--state", state)  # the name is free again
    assert "must be a whole number" in refusal("add", "x", "--concurrent", 0, "--state", state)
    assert "there is no such folder" in refusal("list", "--state", tmp_path / "nowhere")


def test_the_folder_is_of_this_user_alone(tmp_path):
    open_folder = tmp_path / "open"
    open_folder.mkdir(mode=0o755)
    open_folder.chmod(0o755)
    with pytest.raises(UserError, match="other users may enter"):
        state_folder(open_folder, create=True)
    linked = tmp_path / "linked"
    linked.symlink_to(tmp_path / "made")
    (tmp_path / "made").mkdir(mode=0o700)
    with pytest.raises(UserError, match="not a folder of this user"):
        state_folder(linked, create=False)
    made = state_folder(tmp_path / "new", create=True)
    assert made.stat().st_mode & 0o777 == 0o700


def test_the_folder_of_a_server_of_this_user_need_not_be_named_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    made = state_folder(None, create=True)
    (made / "database").touch()
    assert state_folder(None, create=True) == state_folder(None, create=False) == made == tmp_path / "serving"
    (made / MARK).unlink()  # one of an earlier version
    with pytest.raises(UserError, match="no server of yours made this folder"):
        state_folder(None, create=True)
    assert state_folder(tmp_path / "serving", create=True) == state_folder(None, create=True)


def differences(database: Database) -> list:
    from alembic.autogenerate import compare_metadata
    from alembic.migration import MigrationContext

    with database.engine.connect() as connection:
        return compare_metadata(MigrationContext.configure(connection), Table.metadata)


OF_FINETUNING = (importlib.util.find_spec("dstune.finetuning") is not None) and "dstune.finetuning.jobs.tables"
"""Its tables are of the same database."""


def test_the_migrations_make_the_tables(tmp_path):
    if not OF_FINETUNING:
        pytest.skip("the migrations make tables of a wing that is not here")
    importlib.import_module(OF_FINETUNING)
    assert differences(Database.open_folder(tmp_path)) == []
    assert differences(Database.open_folder(tmp_path)) == []  # opened again


def test_a_transaction_is_one(tmp_path):
    database = Database.open_folder(tmp_path)

    def fail() -> None:
        with database.writing.begin() as session:
            session.connection().exec_driver_sql(
                "INSERT INTO keys (id, name, hash, admin, created) VALUES ('a', 'a', 'a', 0, '2026-01-01')"
            )
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert Keys(database).all() == []


def test_a_key_is_revoked_while_another_process_writes(tmp_path):
    """The other one commits between what `revoke` reads and what it writes, or waits until it is done."""
    keys, other = Keys(Database.open_folder(tmp_path)), sqlite3.connect(tmp_path / DATABASE, timeout=0)
    key = keys.add("one")
    tried = []

    def write(*_: object) -> None:
        try:
            other.execute("UPDATE projects SET name = name")
            other.commit()
            tried.append("wrote")
        except sqlite3.OperationalError as error:
            tried.append(str(error))

    event.listen(keys._database.engine, "after_cursor_execute", write)
    keys.revoke("one")
    assert keys.find(key) is None
    assert "database is locked" in tried
    other.close()


def test_processes_that_open_one_new_file_at_once(tmp_path):
    url = f"sqlite:///{tmp_path / DATABASE}"
    with ThreadPoolExecutor(8) as threads:
        opened = list(threads.map(lambda _: Database(url), range(8)))
    assert [differences(database) for database in opened] == [[]] * 8
    for database in opened:
        database.close()


def test_an_address_that_is_none(tmp_path):
    for url in ("nothing", "mysql://x/y", f"sqlite:///{tmp_path}/nowhere/store.sqlite"):
        with pytest.raises(UserError):
            Database(url)


def test_postgresql():
    with postgres() as url:
        databases = [Database(url), Database(url)]
        key = Keys(databases[0]).add("one")
        assert Keys(databases[1]).find(key).name == "one"
        with pytest.raises(UserError, match="a key has this name already"):
            Keys(databases[1]).add("one")
        row = AnswerRow(id="req_1", key=Keys(databases[0]).find(key).id, model="m", version="v", user="u", status=200)
        row.created = now()
        with databases[0].writing.begin() as session:
            session.add(row)
        with databases[1].session() as session:
            assert session.query(AnswerRow).one().user == "u"
        assert differences(databases[0]) == []
        for database in databases:
            database.close()


# -- requests and answers ---------------------------------------------------------------------------------------------


def masked(text: str) -> str:
    return text.replace("0171 555", "<PHONE>")


def test_requests_are_logged_masked_and_forgotten(tmp_path):
    import pyarrow.parquet as pq

    folder = tmp_path / "requests"
    log = RequestLog(folder, masked)

    async def test():
        (tmp_path / "state").mkdir(mode=0o700)
        async with served(tmp_path / "state", log=log) as found:
            client = found.client()
            await client.post("/v1/chat/completions", json=chat("call 0171 555 now", user="u1"))
            await client.post("/v1/chat/completions", json=chat("a b", stream=True, user="u2"))
            await client.post("/v1/chat/completions", json=chat("c"))

    asyncio.run(test())
    (file,) = folder.glob("*.parquet")
    assert file.stat().st_mode & 0o777 == 0o600
    rows = pq.read_table(file).to_pylist()
    assert [row["user"] for row in rows] == ["u1", "u2", None]
    assert json.loads(rows[0]["request"])["messages"][0]["content"] == "call <PHONE> now"
    assert json.loads(rows[0]["answer"])["choices"][0]["message"]["content"] == "call <PHONE> now"
    assert json.loads(rows[1]["answer"]) == ["ab"]
    assert rows[0]["version"] and rows[0]["model"] == "first"
    assert b"0171 555" not in b"".join(one.read_bytes() for one in tmp_path.rglob("*") if one.is_file())


def test_a_user_is_forgotten(tmp_path):
    import pyarrow.parquet as pq

    folder = tmp_path / "requests"

    async def test():
        (tmp_path / "state").mkdir(mode=0o700)
        async with served(tmp_path / "state", log=RequestLog(folder, masked)) as found:
            client, admin = found.client(), found.client(found.admin)
            answers = [
                await client.post("/v1/chat/completions", json=chat("a", user=user)) for user in ("u1", "u2", "u1")
            ]
            for answer in answers:
                assert (
                    await client.post("/v1/feedback", json={"id": answer.headers["x-request-id"], "rating": 1})
                ).is_success
            assert (await client.delete("/admin/users/u1")).status_code == 403
            assert (await admin.delete("/admin/users/u1")).json()["answers"] == 2
            assert (await admin.delete("/admin/users/u1")).json()["answers"] == 0
            with found.gateway.database.session() as session:
                return [row.user for row in session.query(AnswerRow)], session.query(Feedback).count()

    assert asyncio.run(test()) == (["u2"], 1)
    (file,) = folder.glob("*.parquet")
    assert [row["user"] for row in pq.read_table(file).to_pylist()] == ["u2"]


def test_old_files_are_removed(tmp_path):
    log = RequestLog(tmp_path, str, retention_days=1)
    for name, age in (("old", 2), ("new", 0)):
        file = tmp_path / f"{name}.parquet"
        file.write_bytes(b"")
        os.utime(file, (time.time() - age * 86400,) * 2)
    log.close()
    assert [file.name for file in tmp_path.iterdir()] == ["new.parquet"]


def test_an_answer_that_was_cut_is_kept_as_text():
    assert answer_value(b'{"choices": [') == '{"choices": ['
    assert answer_value(b'data: {"choices": [{"index": 0, "delta": {"content": "a"}}]}\n\ndata: {"cho') == ["a"]


@pytest.mark.parametrize("field", ["user", "safety_identifier"])
def test_answers_are_recorded_without_text(tmp_path, field):
    async def test():
        async with served(tmp_path) as found:
            await found.client().post("/v1/chat/completions", json=chat("one two", **{field: "u"}))
            while found.gateway.open:
                await asyncio.sleep(0.01)
            await found.gateway.recorder.flush()
            with found.gateway.database.session() as session:
                (row,) = session.query(AnswerRow)
            return row

    row = asyncio.run(test())
    assert (row.model, row.status, row.tokens, row.user) == ("first", 200, 3, "u")


def test_what_went_wrong_is_recorded_as_such(tmp_path):
    async def test():
        async with served(tmp_path, seconds=0.05) as found:
            client = found.client()
            assert (await client.post("/v1/chat/completions", json=chat("explode"))).status_code == 502
            task = asyncio.create_task(client.post("/v1/chat/completions", json=chat("a b c d")))
            while not found.app.running:
                await asyncio.sleep(0.01)
            task.cancel()
            while found.gateway.open:
                await asyncio.sleep(0.01)
            await found.gateway.recorder.flush()
            with found.gateway.database.session() as session:
                return [row.status for row in session.query(AnswerRow).order_by(AnswerRow.created)]

    assert asyncio.run(test()) == [502, 499]


def test_a_server_that_is_told_to_end_says_so_first_and_finishes(tmp_path):
    """Readiness is 503 while the delay lasts, running requests end whole, later ones find nobody."""
    import signal

    import httpx2

    from dstune.serve.server import Server, make_config, serve_until_signalled

    async def test():
        async with served(tmp_path, seconds=0.05) as found:
            listening = socket.socket()
            listening.bind(("127.0.0.1", 0))
            listening.listen()
            config = make_config(found.gateway, timeout_graceful_shutdown=10)
            task = asyncio.create_task(serve_until_signalled(Server(config), found.gateway, 0.3, [listening]))
            headers = {"authorization": f"Bearer {found.key}"}
            url = f"http://127.0.0.1:{listening.getsockname()[1]}"
            async with httpx2.AsyncClient(base_url=url, headers=headers, trust_env=False, timeout=20) as client:
                assert (await client.get("/readyz")).status_code == 200
                running = asyncio.create_task(client.post("/v1/chat/completions", json=chat("w " * 20)))
                await asyncio.sleep(0.1)
                os.kill(os.getpid(), signal.SIGTERM)
                await asyncio.sleep(0.1)
                assert (await client.get("/readyz")).status_code == 503
                assert (await client.get("/healthz")).status_code == 200
                assert (await running).status_code == 200
                await task
                with pytest.raises(httpx2.ConnectError):
                    await client.get("/healthz")

    asyncio.run(test())


def test_what_clients_write_is_in_no_error_of_the_database(tmp_path):
    """They are logged: the answer of a user whose correction could not be stored would stand there for ever."""
    with Database.open_folder(tmp_path).session() as session:
        session.add(Feedback(id="x", correction="my diagnosis"))
        with pytest.raises(IntegrityError) as caught:
            session.flush()
    assert "my diagnosis" not in str(caught.value)
