"""Attacks through `/v1/feedback`: a database that a client fills."""

from __future__ import annotations

import sqlite3

from alembic import command
from alembic.config import Config
from sqlalchemy import create_engine, func, select

from dstune.serve.store import database as database_module
from dstune.serve.store.tables import Feedback
from tests.support.serving import chat, run


async def answer_of(client) -> str:
    return (await client.post("/v1/chat/completions", json=chat())).headers["x-request-id"]


def test_feedback_of_an_answer_is_one_row(tmp_path):
    async def test(found):
        client = found.client()
        answer = await answer_of(client)
        ids = set()
        for number in range(5):
            told = await client.post("/v1/feedback", json={"id": answer, "correction": f"{number}" * 1000})
            ids.add(told.json()["id"])
        told = await client.post("/v1/feedback", json={"id": answer, "rating": 1})
        assert {told.json()["id"]} == ids
        with found.gateway.database.session() as session:
            (row,) = session.scalars(select(Feedback))
        assert (row.rating, row.correction, row.bytes) == (1, "4" * 1000, 1000)
        large = await client.post("/v1/feedback", json={"id": answer, "correction": "x" * 100_001})
        assert (large.status_code, large.json()["error"]["param"]) == (413, "correction")

    run(test, tmp_path)


def test_feedback_of_a_project_is_bounded(tmp_path):
    async def test(found):
        client = found.client()
        answers = [await answer_of(client) for _ in range(4)]
        body = {"correction": "x" * 1000}
        first, second, third = [await client.post("/v1/feedback", json={"id": id, **body}) for id in answers[:3]]
        assert (first.status_code, second.status_code, third.status_code) == (200, 200, 429)
        assert third.json()["error"]["code"] == "insufficient_quota"
        assert third.headers["retry-after"]
        shorter = await client.post("/v1/feedback", json={"id": answers[0], "correction": "x" * 10})
        assert shorter.status_code == 200
        assert (await client.post("/v1/feedback", json={"id": answers[3], **body})).status_code == 429
        assert (await client.post("/v1/feedback", json={"id": answers[3], "correction": "y" * 990})).status_code == 200
        with found.gateway.database.session() as session:
            assert session.scalar(select(func.sum(Feedback.bytes))) == 2000

    run(test, tmp_path, feedback_bytes=2000)


def test_the_newest_feedback_of_an_answer_is_kept_by_the_migration(tmp_path):
    file = tmp_path / "store.sqlite"
    config = Config()
    config.set_main_option("script_location", str(database_module.Path(database_module.__file__).parent / "migrations"))
    engine = create_engine(f"sqlite:///{file}")
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "0004")
    with sqlite3.connect(file) as own:
        own.execute("INSERT INTO keys (id, name, hash, admin, created) VALUES ('k', 'k', 'h', 0, '2026-01-01')")
        own.execute(
            "INSERT INTO answers (id, key, model, version, status, tokens, seconds, created) "
            "VALUES ('a', 'k', 'm', 'v', 200, 1, 1.0, '2026-01-01')"
        )
        for number, text in enumerate(("old", "newest", "older")):
            day = (2, 4, 3)[number]
            own.execute(
                "INSERT INTO feedback (id, answer, key, correction, created) VALUES (?, 'a', 'k', ?, ?)",
                (f"fb_{number}", text, f"2026-01-0{day}"),
            )
    database_module.Database(f"sqlite:///{file}").close()
    with sqlite3.connect(file) as own:
        assert own.execute("SELECT correction, bytes FROM feedback").fetchall() == [("newest", 6)]
