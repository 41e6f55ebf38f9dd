"""A hostile server that is recorded, and a hostile recording: `dstune record`, `compare` and `retrain`."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from dstune.core.api_client import Address, ApiClient, RequestRefused
from dstune.core.errors import UserError
from dstune.grading.verdicts import FEWEST
from dstune.recording import inventory
from dstune.recording.folder import MANIFEST, Folder
from dstune.recording.inventory import record_inventory, take_inventory
from dstune.recording.kinds import Row, kinds_of, scores_of
from dstune.recording.retrain import read_job

KEY = "sk-planted-for-this-test"
Answer = Callable[[str, int], tuple[int, dict[str, str], Any]]
"""Gets a path and the number of the request; returns the status, headers, and JSON or blocks of bytes without end."""


@contextmanager
def server(answer: Answer) -> Iterator[tuple[str, list[dict[str, str]]]]:
    """Yield the address of a server, and the headers of its requests."""
    seen: list[dict[str, str]] = []

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

        def do_GET(self) -> None:
            seen.append({name.lower(): value for name, value in self.headers.items()})
            status, headers, content = answer(self.path.partition("?")[0], len(seen))
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            blocks = content if isinstance(content, Iterator) else [json.dumps(content).encode()]
            try:
                for block in blocks:
                    self.wfile.write(block)
            except OSError:  # the client has read enough
                return

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{http.server_port}/v1", seen
        finally:
            http.shutdown()


def client_of(url: str) -> ApiClient:
    return ApiClient(Address(url, KEY, attempts=2, seconds=20), pause=lambda seconds: None)


def listing(jobs: Any = (), files: Any = ()) -> Callable[[str], Any]:
    entries = {"/jobs": [*jobs], "/files": [*files]}
    return lambda path: {"data": next((value for end, value in entries.items() if path.endswith(end)), [])}


def test_lists_without_end_are_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each page has a cursor of its own."""
    monkeypatch.setattr(inventory, "MAX_LIST_BYTES", 2**16, raising=False)

    def answer(path: str, number: int) -> tuple[int, dict[str, str], Any]:
        assert number < 500, "it would go on for ever"
        page = [{"id": f"ftjob-{number}-{place}", "note": "x" * 900} for place in range(10)]
        return 200, {}, {"data": page, "has_more": True, "last_id": f"ftjob-{number}-9"}

    with server(answer) as (url, _):
        found = take_inventory(client_of(url))
    assert found.jobs and "65,536 bytes" in found.missing["jobs"]


def test_a_file_without_end_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inventory, "MAX_FILE_BYTES", 2**22, raising=False)
    sent = 0

    def blocks() -> Iterator[bytes]:
        nonlocal sent
        while sent < 2**28:
            sent += 2**20
            yield b"x" * 2**20

    def answer(path: str, number: int) -> tuple[int, dict[str, str], Any]:
        if path.endswith("/content"):
            return 200, {}, blocks()
        return 200, {}, listing(files=[{"id": "file-1", "purpose": "fine-tune"}])(path)

    with server(answer) as (url, _):
        found = take_inventory(client := client_of(url))
        folder = Folder(tmp_path / "recording")
        record_inventory(client, folder, found, ())
        folder.close()
    assert sent < 2**27 and "4,194,304 bytes" in found.missing["file file-1"]
    assert not list((tmp_path / "recording" / "files").iterdir())


def test_identifiers_are_no_paths_and_end_nothing(tmp_path: Path) -> None:
    names = ["../../x", "..", "/etc/passwd", "\0", "a\nb", "x" * 5000, ".lock", "\ud800", "ok"]

    def answer(path: str, number: int) -> tuple[int, dict[str, str], Any]:
        if path.endswith("/content"):
            return 200, {}, {"messages": []}
        jobs = [{"id": name, "status": "succeeded", "training_file": name} for name in names]
        return 200, {}, listing(jobs, [{"id": name, "filename": f"../{name}.csv"} for name in names])(path)

    with server(answer) as (url, _):
        found = take_inventory(client := client_of(url))
        folder = Folder(tmp_path / "here" / "recording")
        record_inventory(client, folder, found, ())
        folder.save_manifest()
        folder.close()
    assert [path.name for path in tmp_path.iterdir()] == ["here"]
    assert [path.name for path in (tmp_path / "here").iterdir()] == ["recording"]
    assert len(list((tmp_path / "here" / "recording" / "jobs").glob("*.json"))) == len(names)


def test_the_key_follows_no_redirect() -> None:
    with server(lambda path, number: (200, {}, {})) as (other, stolen):

        def answer(path: str, number: int) -> tuple[int, dict[str, str], Any]:
            return 302, {"location": f"{other}/models"}, {}

        with server(answer) as (url, seen), pytest.raises(RequestRefused, match="302"):
            client_of(url).get("/models")
    assert not stolen and KEY in seen[0]["authorization"]


def test_an_answer_of_megabytes_is_compared_in_time() -> None:
    """Its model was asked for 1,024 tokens; a server need not obey."""
    rows = [Row("q", "what is expected " * 5, "what is expected", "<b>" * 2_000_000)] * FEWEST
    began = time.process_time()
    (kind,), _ = kinds_of(rows)
    (score,) = kind.scores.values()
    old, new = scores_of(kind.rows, score)
    assert (old > 0.3).all() and (new == 0).all()
    assert time.process_time() - began < 5


def test_a_recording_of_others_sends_no_file_of_this_machine(tmp_path: Path) -> None:
    recording = tmp_path / "recording"
    for folder in ("jobs", "files"):
        (recording / folder).mkdir(parents=True)
    (tmp_path / "private.jsonl").write_text('{"messages": []}\n')
    (recording / "files" / "rows.jsonl").symlink_to(tmp_path / "private.jsonl")
    (recording / MANIFEST).write_text("{}")
    for content in ("rows.jsonl", "../../private.jsonl", str(tmp_path / "private.jsonl")):
        (recording / "files" / "file-1.json").write_text(json.dumps({"content": content}))
        job = {"id": "ftjob-1", "fine_tuned_model": "ft", "training_file": "file-1"}
        (recording / "jobs" / "ftjob-1.json").write_text(json.dumps({"job": job}))
        with pytest.raises(UserError):
            read_job(recording, None)
