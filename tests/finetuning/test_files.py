"""Files and uploads with the official client. The numbers of groups are those of the list of demands on the API:
2 pages, 3 repeated requests, 4 errors, 8 names, 9 parts and broken uploads; 7, tenants, is in tests/security."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest

from dstune.core.errors import UserError
from dstune.finetuning import blobs as blobs_module
from dstune.finetuning.tables import AuditEntry, Blob, File, Part
from tests.support.finetuning_calls import run

ROW = b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'


def contents(found) -> list:
    return sorted((found.folder / "finetuning" / "blobs").glob("*/*"))


def rows(found, table) -> int:
    with found.api.database.session() as session:
        return session.query(table).count()


def test_a_file_comes_back_as_it_went(tmp_path):
    async def test(found):
        client = found.openai(_strict_response_validation=True)
        made = await client.files.create(
            file=("ü.jsonl", ROW), purpose="fine-tune", expires_after={"anchor": "created_at", "seconds": 3600}
        )
        assert (made.bytes, made.filename, made.status) == (len(ROW), "ü.jsonl", "processed")
        assert made.expires_at == made.created_at + 3600
        assert (await client.files.retrieve(made.id)) == made
        assert (await client.files.wait_for_processing(made.id)) == made
        assert (await client.files.content(made.id)).content == ROW
        batch = await client.files.create(file=ROW * 2, purpose="batch")
        assert batch.expires_at == batch.created_at + 30 * 86_400
        assert [one.id async for one in client.files.list(purpose="batch")] == [batch.id]
        deleted = await client.files.delete(made.id)
        assert (deleted.id, deleted.deleted, deleted.object) == (made.id, True, "file")
        for call in (client.files.retrieve, client.files.content, client.files.delete):
            with pytest.raises(openai.NotFoundError) as caught:
                await call(made.id)
            assert (caught.value.param, caught.value.code) == ("id", "file_not_found")
        with found.api.database.session() as session:
            actions = [entry.action for entry in session.query(AuditEntry).order_by(AuditEntry.number)]
            gone = session.query(File).filter_by(id=made.id).one()
        assert actions == ["file.created", "file.created", "file.deleted"]
        assert (gone.filename, gone.blob) == ("", None)  # its name and its bytes are gone, its place in pages is not

    run(test, tmp_path)


def test_the_synchronous_client(tmp_path):
    async def test(found):
        def work():
            with openai.OpenAI(base_url=f"{found.url}/v1/", api_key=found.key, max_retries=0) as client:
                made = client.files.create(file=ROW, purpose="user_data")
                assert [one.id for one in client.files.list()] == [made.id]
                assert client.files.content(made.id).read() == ROW
                assert client.files.delete(made.id).deleted

        await asyncio.to_thread(work)

    run(test, tmp_path)


def test_equal_contents_lie_there_once(tmp_path):
    async def test(found):
        client, stranger = found.openai(), found.openai(found.other)
        first = await client.files.create(file=ROW, purpose="fine-tune")
        second = await client.files.create(file=("other", ROW), purpose="evals")
        assert first.id != second.id
        assert (len(contents(found)), rows(found, Blob)) == (1, 1)
        await stranger.files.create(file=ROW, purpose="fine-tune")
        assert len(contents(found)) == 2  # nothing is shared between projects
        await client.files.delete(first.id)
        assert (await client.files.content(second.id)).content == ROW
        await client.files.delete(second.id)
        assert (len(contents(found)), rows(found, Blob)) == (1, 1)

    run(test, tmp_path)


def test_equal_contents_at_once(tmp_path):
    async def test(found):
        client = found.openai()
        made = await asyncio.gather(*(client.files.create(file=ROW, purpose="fine-tune") for _ in range(8)))
        assert len({one.id for one in made}) == 8
        assert len(contents(found)) == 1
        await asyncio.gather(*(client.files.delete(one.id) for one in made))
        assert (contents(found), rows(found, Blob)) == ([], 0)
        assert not list((found.folder / "finetuning" / "tmp").iterdir())

    run(test, tmp_path)


def test_group_2_pages_while_files_come_and_go(tmp_path, monkeypatch):
    monkeypatch.setattr("dstune.finetuning.files.unix_time", lambda: 1_800_000_000)  # equal seconds

    async def test(found):
        client = found.openai()
        made = [(await client.files.create(file=ROW, purpose="fine-tune")).id for _ in range(25)]
        seen = []
        async for one in client.files.list(limit=4):
            seen.append(one.id)
            if len(seen) == 6:
                await client.files.create(file=ROW, purpose="fine-tune")
        assert seen == made[::-1]
        first = await client.files.list(limit=4, order="asc")
        assert [one.id for one in first.data] == made[:4]
        assert (first.first_id, first.last_id, first.has_more) == (made[0], made[3], True)
        walked = []
        async for one in client.files.list(limit=3, order="asc"):  # what is listed is deleted on the way
            walked.append(one.id)
            await client.files.delete(one.id)
        assert walked[:25] == made
        assert (await client.files.list()).data == []
        for query, param in (
            ({"after": "file-none"}, "after"), ({"limit": 0}, "limit"), ({"limit": 10_001}, "limit"),
            ({"order": "up"}, "order"), ({"extra_query": {"purposes": "x"}}, "purposes"),
        ):  # fmt: skip
            with pytest.raises(openai.BadRequestError) as caught:
                await client.files.list(**query)
            assert caught.value.param == param

    run(test, tmp_path)


def test_group_3_a_repeated_upload_is_one_file(tmp_path):
    async def test(found):
        client = found.openai()

        async def create(content=ROW, key=found.key, **headers):
            made = await found.openai(key).files.create(file=content, purpose="fine-tune", extra_headers=headers)
            return made.id

        again = {"x-stainless-retry-count": "1", "x-stainless-read-timeout": "1"}
        first = await create()
        assert await create(**again) == first
        assert await create() != first  # on purpose
        assert await create(ROW * 2, **again) not in (first, None)  # another content
        assert await create(key=found.owner, **again) != first  # another key
        await asyncio.sleep(3.1)
        assert await create(ROW * 2, **again) != first  # three time-outs later it is a new one
        named = await create(**{"Idempotency-Key": "one"})
        assert await create(**{"Idempotency-Key": "one"}) == named
        with pytest.raises(openai.BadRequestError) as caught:
            await create(ROW * 3, **{"Idempotency-Key": "one"})
        assert caught.value.code == "idempotency_key_reused"
        await client.files.delete(first)
        deleted = await client.files.delete(first, extra_headers={"x-stainless-retry-count": "1"})
        assert deleted.deleted  # the answer to the first request was lost

    run(test, tmp_path)


def test_group_4_every_error_has_the_shape_of_the_api(tmp_path):
    async def test(found):
        client = found.openai()
        cases = (
            ({"file": b"", "purpose": "batch"}, "file", "empty_file"),
            ({"file": ROW, "purpose": "vision"}, "purpose", "invalid_purpose"),
            ({"file": ROW, "purpose": "x", "extra_body": {"more": "1"}}, "more", "unknown_parameter"),
            ({"file": ROW, "purpose": "batch", "expires_after": {"anchor": "now", "seconds": 3600}},
             "expires_after.anchor", None),
            ({"file": ROW, "purpose": "batch", "expires_after": {"anchor": "created_at", "seconds": 3599}},
             "expires_after.seconds", None),
            ({"file": ROW, "purpose": "batch", "expires_after": {"anchor": "created_at", "seconds": "1e4"}},
             "expires_after.seconds", None),
            ({"file": ("a" * 600, ROW), "purpose": "batch"}, "filename", "invalid_value"),
        )  # fmt: skip
        for given, param, code in cases:
            with pytest.raises(openai.BadRequestError) as caught:
                await client.files.create(**given)
            error = caught.value
            assert (error.param, error.code, error.type) == (param, code, "invalid_request_error"), given
            assert error.request_id.startswith("req_")
        with pytest.raises(openai.PermissionDeniedError):
            await found.openai(found.reader).files.create(file=ROW, purpose="batch")
        assert [one.id async for one in found.openai(found.reader).files.list()] == []
        with pytest.raises(openai.PermissionDeniedError) as caught:
            await found.openai(organization="org-none").files.list()
        assert caught.value.code == "organization_mismatch"
        await found.openai(organization="org-default", project="proj_default").files.list()
        raw = found.http()
        for content, kind in (
            (b"nothing", "multipart/form-data; boundary=x"),
            (b"--x\r\n", "multipart/form-data; boundary=x"),
            (b"--x\r\nContent-Disposition: form-data\r\n\r\na\r\n--x--\r\n", "multipart/form-data; boundary=x"),
            (b"{}", "application/json"),
            (b"", "multipart/form-data"),
            (b'--x\r\nContent-Disposition: form-data; name="file"\r\n\r\na\r\n--x--\r\n', "multipart/form-data; boundary=x"),
        ):  # fmt: skip
            answer = await raw.post("/v1/files", content=content, headers={"content-type": kind})
            assert answer.status_code == 400, (content, answer.text)
            assert set(answer.json()) == {"error"}
            assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
        empty = (await raw.get("/v1/files")).json()
        assert empty == {"object": "list", "data": [], "has_more": False, "first_id": "", "last_id": ""}
        made = (await raw.post("/v1/files", files={"file": ("a", b"x")}, data={"purpose": "evals"})).json()
        assert set(made) == {"id", "object", "bytes", "created_at", "filename", "purpose", "status"}  # and nothing null
        await raw.delete(f"/v1/files/{made['id']}")
        for path, status in (("/v1/files?purpose=%00", 400), ("/v1/files?a%00=1", 400), ("/v1/files/%00", 404)):
            assert (await raw.get(path)).status_code == status  # PostgreSQL takes no NUL
        assert contents(found) == []
        assert not list((found.folder / "finetuning" / "tmp").iterdir())

    run(test, tmp_path)


def test_a_file_that_is_too_large_and_a_project_that_is_full(tmp_path):
    async def test(found):
        client = found.openai()
        with pytest.raises(openai.APIStatusError) as caught:
            await client.files.create(file=b"x" * 2001, purpose="batch")
        assert (caught.value.status_code, caught.value.code) == (413, "file_too_large")
        await client.files.create(file=b"x" * 2000, purpose="batch")
        with pytest.raises(openai.RateLimitError) as caught:
            await found.openai(max_retries=2).files.create(file=b"y" * 1500, purpose="batch")
        assert caught.value.code == "insufficient_quota"
        assert caught.value.response.headers["x-should-retry"] == "false"
        await client.files.create(file=b"x" * 2000, purpose="batch")  # the same bytes once more need no space
        assert len(contents(found)) == 1
        upload = await client.uploads.create(filename="a", purpose="batch", bytes=900, mime_type="text/plain")
        await client.uploads.parts.create(upload.id, data=b"z" * 900)
        with pytest.raises(openai.RateLimitError) as caught:
            await client.uploads.parts.create(upload.id, data=b"z" * 900)
        assert caught.value.code == "insufficient_quota"

    run(test, tmp_path, api={"file_bytes": 2000, "project_bytes": 3000})


def test_group_9_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    def full(self, chunk):
        raise OSError(28, "No space left on device", str(self.path))

    async def test(found):
        monkeypatch.setattr(blobs_module.Staged, "_write", full)
        with pytest.raises(openai.InternalServerError) as caught:
            await found.openai(max_retries=2).files.create(file=ROW * 40_000, purpose="batch")
        assert caught.value.code == "storage_failed"
        assert caught.value.response.headers["x-should-retry"] == "false"
        assert str(found.folder) not in caught.value.message
        assert (contents(found), rows(found, File)) == ([], 0)
        assert not list((found.folder / "finetuning" / "tmp").iterdir())

    run(test, tmp_path)


def test_a_client_that_leaves_in_the_middle(tmp_path):
    async def test(found):
        host, port = found.url.removeprefix("http://").split(":")
        _, writer = await asyncio.open_connection(host, int(port))
        head = (
            f"POST /v1/files HTTP/1.1\r\nHost: {host}:{port}\r\nAuthorization: Bearer {found.key}\r\n"
            "Content-Type: multipart/form-data; boundary=x\r\nContent-Length: 5000000\r\n\r\n"
            '--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
        )
        writer.write(head.encode() + b"z" * 3_000_000)
        await writer.drain()
        await asyncio.sleep(0.3)
        assert list((found.folder / "finetuning" / "tmp").iterdir())
        writer.close()
        for _ in range(100):
            await asyncio.sleep(0.05)
            if not list((found.folder / "finetuning" / "tmp").iterdir()):
                break
        else:
            pytest.fail("what it had sent stays on the disk")
        assert rows(found, File) == 0

    run(test, tmp_path)


def test_group_8_names_stay_text(tmp_path):
    names = (
        "${oc.env:HOME}", "../../../etc/passwd", 'a"b', "a\r\nX-Injected: 1\r\n", "日本語 😀.jsonl", "a;b='c", "%2F%00",
        "C:\\a\\b.jsonl", "{{ 1 }}", "-rf", ".", "a" * 512,
    )  # fmt: skip

    async def test(found):
        client = found.openai()
        for name in names:
            made = await client.files.create(file=(name, ROW), purpose="fine-tune")
            answer = await found.http().get(f"/v1/files/{made.id}/content")
            assert (answer.content, "x-injected" in answer.headers) == (ROW, False)
            kept = (await client.files.retrieve(made.id)).filename
            assert kept == ("b.jsonl" if name.startswith("C:") else name), name  # what clients of Windows put before it
            upload = await client.uploads.create(filename=name, purpose="batch", bytes=1, mime_type="text/plain")
            assert upload.filename == name
        assert len(contents(found)) == 1
        for path in ("..%2F..%2Fstore.sqlite", "%00", "a%2Fb"):
            answer = await found.http().get(f"/v1/files/{path}")
            assert answer.status_code == 404
            assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
        for bad in ("\ud800", "a\0b", "", 5):
            body = json.dumps({"filename": bad, "purpose": "batch", "bytes": 1, "mime_type": "a"})
            answer = await found.http(**{"content-type": "application/json"}).post("/v1/uploads", content=body)
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, "filename"), bad

    run(test, tmp_path)


def test_group_9_parts(tmp_path, monkeypatch):
    async def test(found):
        client = found.openai(_strict_response_validation=True)
        content = os.urandom(300_000)
        upload = await client.uploads.create(
            filename="big.jsonl", purpose="fine-tune", bytes=len(content), mime_type="application/jsonl"
        )
        assert (upload.status, upload.expires_at) == ("pending", upload.created_at + 3600)
        pieces = [content[at : at + 40_000] for at in range(0, len(content), 40_000)]
        assert len(pieces) == 8
        order = [3, 1, 7, 0, 2, 6, 5, 4]
        parts = await asyncio.gather(*(client.uploads.parts.create(upload.id, data=pieces[at]) for at in order))
        ids = [parts[order.index(at)].id for at in range(8)]
        repeated = await client.uploads.parts.create(upload.id, data=pieces[0])  # never named
        assert len(contents(found)) == 9
        for part_ids, code in (
            (ids[:-1], "upload_size_mismatch"), ([*ids[:-1], "part_none"], "part_not_found"),
            ([*ids[:-1], ids[0]], None), ([], "invalid_value"),
        ):  # fmt: skip
            with pytest.raises(openai.BadRequestError) as caught:
                await client.uploads.complete(upload.id, part_ids=part_ids)
            assert caught.value.code == code
        with pytest.raises(openai.BadRequestError) as caught:
            await client.uploads.complete(upload.id, part_ids=ids, md5="0" * 32)
        assert caught.value.code == "checksum_mismatch"
        assert rows(found, File) == 0
        md5 = hashlib.md5(content).hexdigest()
        done = await client.uploads.complete(upload.id, part_ids=ids, md5=md5)
        assert (done.status, done.file.bytes, done.file.filename) == ("completed", len(content), "big.jsonl")
        again = await client.uploads.complete(upload.id, part_ids=ids, md5=md5)  # its answer was lost
        assert again.file.id == done.file.id
        assert (await client.files.content(done.file.id)).content == content
        assert (len(contents(found)), rows(found, Part)) == (1, 0)
        for call in (client.uploads.parts.create(upload.id, data=b"x"), client.uploads.cancel(upload.id)):
            with pytest.raises(openai.BadRequestError) as caught:
                await call
            assert caught.value.code == "upload_completed"
        assert repeated.upload_id == upload.id

        other = await client.uploads.create(filename="a", purpose="batch", bytes=3, mime_type="text/plain")
        await client.uploads.parts.create(other.id, data=b"abc")
        with pytest.raises(openai.BadRequestError) as caught:
            await client.uploads.parts.create(other.id, data=b"")
        assert caught.value.code == "empty_file"
        assert (await client.uploads.cancel(other.id)).status == "cancelled"
        assert (await client.uploads.cancel(other.id)).status == "cancelled"
        with pytest.raises(openai.BadRequestError) as caught:
            await client.uploads.complete(other.id, part_ids=["part_x"])
        assert caught.value.code == "upload_cancelled"

        late = await client.uploads.create(filename="a", purpose="batch", bytes=3, mime_type="text/plain")
        part = await client.uploads.parts.create(late.id, data=b"abc")
        later = time.time() + 3601
        for place in ("uploads", "files"):
            monkeypatch.setattr(f"dstune.finetuning.{place}.unix_time", lambda: int(later))
        with pytest.raises(openai.BadRequestError) as caught:
            await client.uploads.complete(late.id, part_ids=[part.id])
        assert caught.value.code == "upload_expired"
        await asyncio.to_thread(found.api.uploads.sweep)
        assert (len(contents(found)), rows(found, Part)) == (1, 0)

    run(test, tmp_path)


def test_uploads_that_are_put_together_hold_up_nothing_else(tmp_path, monkeypatch):
    async def test(found):
        client, release = found.openai(), threading.Event()
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(4))
        given = {"filename": "a", "purpose": "batch", "bytes": 3, "mime_type": "text/plain"}
        uploads = [await client.uploads.create(**given) for _ in range(5)]
        parts = [await client.uploads.parts.create(one.id, data=b"abc") for one in uploads]
        usual = found.api.blobs.read

        def read(blob):
            assert release.wait(60)
            yield from usual(blob)

        monkeypatch.setattr(found.api.blobs, "read", read)
        completing = [
            asyncio.create_task(client.uploads.complete(one.id, part_ids=[part.id]))
            for one, part in zip(uploads, parts, strict=True)
        ]
        await asyncio.sleep(0.5)
        try:
            async with asyncio.timeout(20):
                assert [one async for one in client.files.list()] == []
        finally:
            release.set()
        assert {one.status for one in await asyncio.gather(*completing)} == {"completed"}

    run(test, tmp_path)


def test_a_file_in_chunks_by_the_clients_own_helper(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(ROW * 3000)

    async def test(found):
        client = found.openai()
        done = await client.uploads.upload_file_chunked(
            file=path, mime_type="application/jsonl", purpose="fine-tune", part_size=100_000
        )
        assert done.status == "completed"
        assert (await client.files.content(done.file.id)).content == path.read_bytes()

    (tmp_path / "state").mkdir()
    run(test, tmp_path / "state")


def test_files_expire(tmp_path, monkeypatch):
    async def test(found):
        client = found.openai()
        made = await client.files.create(
            file=ROW, purpose="fine-tune", expires_after={"anchor": "created_at", "seconds": 3600}
        )
        kept = await client.files.create(file=ROW * 2, purpose="fine-tune")
        monkeypatch.setattr("dstune.finetuning.files.unix_time", lambda: made.created_at + 3600)
        with pytest.raises(openai.NotFoundError):
            await client.files.retrieve(made.id)
        assert [one.id async for one in client.files.list()] == [kept.id]
        assert len(contents(found)) == 2
        await asyncio.to_thread(found.api.files.sweep)
        assert len(contents(found)) == 1

    run(test, tmp_path)


def test_what_a_crash_leaves_is_collected_when_it_is_old(tmp_path):
    async def test(found):
        client = found.openai()
        made = await client.files.create(file=ROW, purpose="fine-tune")
        staged = found.api.files.stage()
        staged.write(b"half")
        orphan = contents(found)[0].with_name("blob-of-nobody")
        orphan.write_bytes(b"x")
        # They are young: somebody may still be writing them.
        assert found.api.blobs.sweep([*found.api.files.stored_blobs(), *found.api.uploads.stored_parts()]) == 0
        old = time.time() - blobs_module.STALE_SECONDS - 1
        for path in (staged.path, orphan, *contents(found)):
            os.utime(path, (old, old))
        assert found.api.blobs.sweep([*found.api.files.stored_blobs(), *found.api.uploads.stored_parts()]) == 2
        assert (await client.files.content(made.id)).content == ROW

    run(test, tmp_path)


def test_a_job_keeps_the_bytes_of_a_deleted_file(tmp_path):
    async def test(found):
        client = found.openai()
        made = await client.files.create(file=ROW, purpose="fine-tune")
        with found.api.database.session() as session:
            found.api.files.snapshot(found.api.files.of(session, "proj_default", made.id), tmp_path / "snapshot.jsonl")
        await client.files.delete(made.id)
        assert contents(found) == []
        assert (tmp_path / "snapshot.jsonl").read_bytes() == ROW

    run(test, tmp_path)


def test_files_in_a_store_elsewhere(tmp_path):
    import fsspec

    # Not in memory: there all who read a file share one position.
    store = fsspec.filesystem("file")
    root = f"file://{tmp_path}/elsewhere"

    def there() -> int:
        return len(store.find(root))

    async def test(found):
        client = found.openai()
        first = await client.files.create(file=ROW * 50_000, purpose="fine-tune")
        second = await client.files.create(file=ROW * 50_000, purpose="evals")
        assert (there(), contents(found)) == (1, [])
        assert (await client.files.content(second.id)).content == ROW * 50_000
        with found.api.database.session() as session:
            found.api.files.snapshot(found.api.files.of(session, "proj_default", first.id), tmp_path / "snapshot")
        assert (tmp_path / "snapshot").read_bytes() == ROW * 50_000
        upload = await client.uploads.create(filename="a", purpose="batch", bytes=6, mime_type="text/plain")
        parts = [(await client.uploads.parts.create(upload.id, data=data)).id for data in (b"abc", b"def")]
        done = await client.uploads.complete(upload.id, part_ids=parts)
        assert (await client.files.content(done.file.id)).content == b"abcdef"
        assert there() == 2
        for one in (first, second, done.file):
            await client.files.delete(one.id)
        assert there() == 0
        assert not list((found.folder / "finetuning" / "tmp").iterdir())
        staged = found.api.files.stage()
        staged.write(b"x")
        staged.close()
        assert there() == 1  # a crash here leaves it
        assert found.api.blobs.sweep([]) == 0

    run(test, tmp_path, api={"store": root})


def test_a_store_that_nobody_knows(tmp_path):
    with pytest.raises(UserError, match="--files"):
        blobs_module.RemoteBlobs(tmp_path, "nothing://a/b")


def test_a_body_that_trickles_and_too_many_at_once(tmp_path, monkeypatch):
    async def trickle(found) -> bytes:
        host, port = found.url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        head = (
            f"POST /v1/files HTTP/1.1\r\nHost: {host}:{port}\r\nAuthorization: Bearer {found.key}\r\n"
            "Content-Type: multipart/form-data; boundary=x\r\nContent-Length: 5000000\r\n\r\n"
            '--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
        )
        writer.write(head.encode())
        answer = asyncio.create_task(reader.read(65536))  # not to the end, which may be a reset
        while not answer.done():
            with contextlib.suppress(ConnectionError):
                writer.write(b"z")
                await writer.drain()
            await asyncio.sleep(0.05)
        writer.close()
        return await answer

    async def test(found):
        answer = await trickle(found)
        assert b"408" in answer.split(b"\r\n")[0] and b"x-should-retry: false" in answer
        assert not list((found.folder / "finetuning" / "tmp").iterdir())
        monkeypatch.setattr("dstune.finetuning.receiving.MOST_FIRST", 0)
        with pytest.raises(openai.RateLimitError):
            await found.openai().files.create(file=ROW, purpose="batch")
        monkeypatch.undo()
        await found.openai().files.create(file=ROW, purpose="batch")

    run(test, tmp_path, body_seconds=1.0)
