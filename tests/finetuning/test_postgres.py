"""What depends on the database, over PostgreSQL: groups 2, 3, 4, 6 and 9 of the demands on the fine-tuning API."""

from __future__ import annotations

import asyncio
import time

import openai
import pytest
from sqlalchemy import create_engine, text

from benchmarks.fuzz_api import Fuzzer
from dstune.finetuning.tables import Blob, Delivery, Usage
from dstune.serve.store.database import Database
from tests.finetuning import test_states as states
from tests.support.finetuning import cloud
from tests.support.jobs import Bench
from tests.support.postgres import postgres

ROW = b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'


@pytest.mark.slow
def test_files_uploads_pages_webhooks_and_usage(tmp_path):
    async def test(found):
        client = found.openai()
        made = await asyncio.gather(*(client.files.create(file=ROW, purpose="fine-tune") for _ in range(12)))
        ids = {one.id for one in made}
        assert len(ids) == 12
        with found.api.database.session() as session:
            assert [blob.references for blob in session.query(Blob)] == [12]
        listed = [one.id async for one in client.files.list(limit=5)]
        assert set(listed) == ids and len(listed) == 12
        first, *others = sorted(ids)
        deleted = await asyncio.gather(*(client.files.delete(first) for _ in range(8)), return_exceptions=True)
        assert sum(isinstance(one, openai.NotFoundError) for one in deleted) == 7, deleted
        with found.api.database.session() as session:
            assert [blob.references for blob in session.query(Blob)] == [11]
        await asyncio.gather(*(client.files.delete(one) for one in others))
        with found.api.database.session() as session:
            assert session.query(Blob).count() == 0

        headers = {"Idempotency-Key": "a"}
        twice = await asyncio.gather(
            *(client.files.create(file=ROW, purpose="fine-tune", extra_headers=headers) for _ in range(6))
        )
        assert len({one.id for one in twice}) == 1
        with pytest.raises(openai.BadRequestError):
            await client.files.create(file=ROW * 2, purpose="fine-tune", extra_headers=headers)

        upload = await client.uploads.create(filename="a", purpose="batch", bytes=6, mime_type="text/plain")
        parts = await asyncio.gather(*(client.uploads.parts.create(upload.id, data=data) for data in (b"abc", b"def")))
        order = [part.id for part in parts]
        done = await asyncio.gather(*(client.uploads.complete(upload.id, part_ids=order) for _ in range(4)))
        assert len({one.file.id for one in done}) == 1
        assert (await client.files.content(done[0].file.id)).content == b"abcdef"

        await client.webhooks.create(name="a", url="https://nowhere.invalid/", event_types=["batch.failed"])
        with found.api.database.writing.begin() as session:
            found.api.webhooks.enqueue(session, "proj_default", "batch.failed", "batch_1")
            session.add(
                Usage(
                    project="proj_default", key="k", kind="training", object="o", model="m", created_at=int(time.time())
                )
            )
        for _ in range(200):
            with found.api.database.session() as session:
                if session.query(Delivery).one().attempts:
                    break
            await asyncio.sleep(0.05)
        else:
            pytest.fail("nothing is sent")
        admin = found.openai(found.owner, admin_api_key=found.owner).admin.organization
        page = await admin.usage.costs(start_time=int(time.time()) - 3600, group_by=["project_id"])
        assert len(page.data[0].results) == 1
        assert len([one async for one in admin.audit_logs.list(limit=3)]) >= 26

    with postgres() as url:

        async def main():
            async with cloud(tmp_path, database=Database(url), api={"delivery_seconds": 0.05}) as found:
                await test(found)

        asyncio.run(main())


@pytest.mark.slow
def test_jobs_from_their_files_to_their_models(tmp_path):
    """What holds of jobs over SQLite, each in a database of its own."""
    with postgres() as url:
        engine = create_engine(url.replace("postgresql:", "postgresql+psycopg:"), isolation_level="AUTOCOMMIT")
        for test in (
            states.test_a_job_from_its_files_to_its_model,
            states.test_a_pause_waits_for_the_save_and_a_resume_goes_on,
            states.test_cancelling_ends_the_process_and_frees_its_devices_afterwards,
            states.test_another_process_takes_over_where_the_first_one_was_killed,
            states.test_metadata_filters_and_pages,
        ):
            name = f"t{len(list(tmp_path.iterdir()))}"
            with engine.connect() as connection:
                connection.execute(text(f"CREATE DATABASE {name}"))
            folder = tmp_path / name
            folder.mkdir()
            bench = Bench(folder, url=url.replace("/postgres?", f"/{name}?"))
            test(bench)
            bench.database.close()
        engine.dispose()


@pytest.mark.slow
def test_made_up_requests(tmp_path):
    """What SQLite takes and PostgreSQL does not (a NUL, an integer of 65 bits) is refused, and no error of the server."""

    async def main(url):
        async with cloud(tmp_path, database=Database(url)) as found:
            keys = [found.key, found.owner, found.owner, found.other]
            fuzzer = Fuzzer(found.gateway, keys, tmp_path, seed=1)
            await fuzzer.run(3000)
        assert fuzzer.findings == {}

    with postgres() as url:
        asyncio.run(main(url))
