"""`dstune record`: complete however the service fails and however often it is killed, and nothing twice; the key nowhere."""

from __future__ import annotations

import hashlib
import json
import os
import random
import resource
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from dstune.core import api_client
from dstune.core.api_client import ServerUnreachable
from dstune.core.errors import UserError
from dstune.recording.command import main
from dstune.recording.folder import Folder, file_name
from dstune.recording.prompts import prompt_of
from tests.support.hosted_double import Hosted, huge_block, serving

MIB = 1 << 20


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(api_client, "FIRST_PAUSE", 0.001)


@pytest.fixture
def hosted(monkeypatch):
    service = Hosted()
    monkeypatch.setenv("OPENAI_API_KEY", service.key)
    return service


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def answers(folder: Path) -> list[dict]:
    return [row for path in sorted((folder / "answers").iterdir()) for row in lines(path)]


def pairs(folder: Path) -> list[tuple[str, str]]:
    return [(row["model"], row["messages"][0]["content"]) for row in answers(folder)]


def holds_key(folder: Path, key: str) -> bool:
    return any(key.encode() in path.read_bytes() for path in folder.rglob("*") if path.is_file())


def record(folder: Path, url: str, *flags: str) -> int:
    return main([str(folder), "--server", f"{url}/v1", *flags])


def manifest(folder: Path) -> dict:
    return json.loads((folder / "manifest.json").read_text())


def check_complete(folder: Path, hosted: Hosted) -> None:
    for number, job in enumerate(hosted.jobs):
        recorded = json.loads((folder / "jobs" / f"ftjob-{number}.json").read_text())
        assert recorded["job"] == job
        assert recorded["events"] == hosted.events(job["id"])
        assert recorded["checkpoints"] == hosted.checkpoints(job["id"])
    for name, content in hosted.contents.items():
        assert (folder / "files" / f"{name}.jsonl").read_bytes() == content
        entry = json.loads((folder / "files" / f"{name}.json").read_text())
        assert entry["sha256"] == hashlib.sha256(content).hexdigest() and entry["bytes"] == len(content)
    expected = {
        (job["fine_tuned_model"], json.loads(line)["messages"][0]["content"])
        for job in hosted.jobs
        for content in hosted.contents.values()
        for line in content.splitlines()
    }
    assert sorted(pairs(folder)) == sorted(expected)  # as lists: nothing twice
    assert manifest(folder)["complete"] and manifest(folder)["missing"] == {}
    for name, entry in manifest(folder)["stored"].items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == entry["sha256"]
    assert not list(folder.rglob("*.partial")) and not list(folder.rglob("*.incomplete"))


def test_it_records_jobs_files_models_and_answers_through_pages_failures_and_cuts(tmp_path, hosted, capsys):
    folder = tmp_path / "recording"
    hosted.failures = ["429", "cut", "503", "500", "", "cut", "", "429"] * 8
    with serving(hosted) as url:
        assert record(folder, url, "--prompts-of", "training", "--logprobs", "2") == 0
        check_complete(folder, hosted)
        before, sent = hosted.requests.copy(), hosted.bytes_sent.copy()
        assert max(count for name, count in before.items() if name.startswith("[")) == 1
        hosted.failures = []
        assert record(folder, url, "--prompts-of", "training", "--logprobs", "2") == 0
        asked = {name for name, count in (hosted.requests - before).items() if count}
    assert not any(name.startswith("[") or "events" in name for name in asked)
    assert hosted.bytes_sent == sent
    check_complete(folder, hosted)
    row = answers(folder)[0]
    assert row["logprobs"]["content"][0]["logprob"] == -0.25
    assert row["expected"]["content"].startswith("answer ") and row["usage"]["total_tokens"] == 6
    assert "weight" not in json.dumps([entry["messages"] for entry in answers(folder)])
    assert json.loads((folder / "models.json").read_text())["data"] == hosted.models
    assert manifest(folder)["shutdown_dates"]["gpt-4o-2024-08-06"] == "2027-01-14"
    assert "ft:gpt-4o-2024-08-06:acme::0 is switched off on 2027-01-14 (its base" in capsys.readouterr().out
    for path in [folder, *folder.rglob("*")]:
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path
    assert not holds_key(folder, hosted.key)


def test_a_key_in_what_the_server_says_is_written_nowhere(tmp_path, hosted, capsys):
    hosted.jobs[0]["metadata"] = {"note": f"made with {hosted.key}"}
    hosted.models[0]["owned_by"] = hosted.key
    folder, key_file = tmp_path / "recording", tmp_path / "key"
    with serving(hosted) as url:
        assert record(folder, url) == 0
        assert not holds_key(folder, hosted.key) and "made with <KEY>" in (folder / "jobs" / "ftjob-0.json").read_text()
        key_file.write_text("sk-revoked-0123456789")
        key_file.chmod(0o600)
        with pytest.raises(UserError) as raised:
            record(folder, url, "--key-file", str(key_file))
    assert "Incorrect API key" in str(raised.value) and "sk-revoked" not in str(raised.value)
    assert hosted.key not in "".join(capsys.readouterr())


def test_a_line_that_a_killed_process_left_is_asked_again(tmp_path, hosted):
    folder = tmp_path / "recording"
    with serving(hosted) as url:
        assert record(folder, url, "--prompts-of", "training") == 0
        path = sorted((folder / "answers").iterdir())[0]
        whole = path.read_bytes()
        path.write_bytes(whole[:-30])
        assert record(folder, url, "--prompts-of", "training") == 0
    assert [json.loads(line)["key"] for line in path.read_bytes().splitlines()] == [
        json.loads(line)["key"] for line in whole.splitlines()
    ]
    check_complete(folder, hosted)


def test_refused_prompts_are_said_and_asked_again(tmp_path, hosted, capsys):
    folder = tmp_path / "recording"
    hosted.refused = {"messages": "the model is not served by this deployment"}
    name = "20 answers of ft:gpt-4o-2024-08-06:acme::0"
    with serving(hosted) as url:
        hosted.jobs = hosted.jobs[:1]
        assert record(folder, url, "--prompts-of", "training") == 0
        assert "is not served by this deployment" in manifest(folder)["missing"][name]
        assert f"not recorded: {name}: the prompts were refused" in capsys.readouterr().err
        assert all("error" in row for row in answers(folder)) and len(answers(folder)) == 20
        hosted.refused = {}
        assert record(folder, url, "--prompts-of", "training") == 0
    assert manifest(folder)["missing"] == {} and len(answers(folder)) == 20
    assert not any("error" in row for row in answers(folder))


@pytest.mark.ci
def test_killed_ten_times_it_is_complete_and_has_nothing_twice(tmp_path, hosted):
    hosted.delay = 0.05
    folder, log = tmp_path / "recording", tmp_path / "log"
    generator = random.Random(0)
    with serving(hosted) as url:
        command = [sys.executable, "-m", "dstune", "record", str(folder), "--server", f"{url}/v1"]
        command += ["--prompts-of", "training", "--at-once", "2"]
        kills = 0
        while kills < 10:
            hosted.failures = ["429", "cut", "503"]
            before = sum(hosted.requests.values())
            with log.open("ab") as output:
                process = subprocess.Popen(command, stdout=output, stderr=output)
            # somewhere in what is left: in the lists, in the files or in the answers
            target = before + generator.randint(1, 18)
            while sum(hosted.requests.values()) < target and process.poll() is None:
                time.sleep(0.002)
            assert process.poll() is None, log.read_text()
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            kills += 1
        hosted.failures = []
        with log.open("ab") as output:
            assert subprocess.run(command, stdout=output, stderr=output).returncode == 0, log.read_text()
    check_complete(folder, hosted)
    # A request whose answer was on its way when the process died is asked again: two at a time.
    asked_again = sum(count - 1 for name, count in hosted.requests.items() if name.startswith("["))
    assert asked_again <= 2 * kills
    assert not holds_key(folder, hosted.key) and hosted.key not in log.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("ranges", [True, False])
def test_a_file_of_512_mb_is_streamed_and_cut_connections_go_on(tmp_path, hosted, ranges):
    size = 512 * MIB
    hosted.ranges = ranges
    hosted.contents, hosted.jobs, hosted.huge = {}, [], {"file-huge": size}
    folder = tmp_path / "recording"
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with serving(hosted) as url:
        hosted.failures = [*[""] * 4, "cut", "", "cut"]
        assert record(folder, url) == 0
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    digest = hashlib.sha256()
    for start in range(0, size, MIB):
        digest.update(huge_block(start, start + MIB))
    entry = json.loads((folder / "files" / "file-huge.json").read_text())
    assert entry["sha256"] == digest.hexdigest() and entry["bytes"] == size
    assert hosted.bytes_sent["file-huge"] == size if ranges else hosted.bytes_sent["file-huge"] > size
    assert grown < 100


def test_a_file_whose_connection_is_cut_goes_on_where_it_was(tmp_path, hosted):
    hosted.jobs, hosted.contents, hosted.huge = [], {}, {"file-huge": 3 * MIB + 7}
    with serving(hosted) as url:
        hosted.failures = [*[""] * 4, "cut", "", "cut"]
        assert record(tmp_path / "a", url) == 0
        assert hosted.bytes_sent["file-huge"] == 3 * MIB + 7
        hosted.ranges, hosted.failures = False, [*[""] * 4, "cut"]
        assert record(tmp_path / "b", url) == 0
    for folder in (tmp_path / "a", tmp_path / "b"):
        assert (folder / "files" / "file-huge.jsonl").read_bytes() == huge_block(0, 3 * MIB + 7)


def test_a_revoked_key_stops_it_and_another_goes_on(tmp_path, hosted, monkeypatch, capsys):
    folder = tmp_path / "recording"

    def revoke_after_ten(body):
        if len([name for name in hosted.requests if name.startswith("[")]) == 10:
            hosted.key = "sk-another-987654321"
        return hosted.complete(body)

    first_key, hosted.answer = hosted.key, revoke_after_ten
    with serving(hosted) as url:
        with pytest.raises(UserError, match="HTTP 401 Incorrect API key") as raised:
            record(folder, url, "--prompts-of", "training")
        assert first_key not in str(raised.value) and raised.value.exit_code == 2
        assert 10 <= len(answers(folder)) < 20 and manifest(folder)["complete"] is False
        hosted.answer = hosted.complete
        key_file = tmp_path / "key"
        key_file.write_text(f"{hosted.key}\n")
        key_file.chmod(0o644)
        with pytest.raises(UserError, match="others can read it"):
            record(folder, url, "--prompts-of", "training", "--key-file", str(key_file))
        key_file.chmod(0o600)
        assert record(folder, url, "--prompts-of", "training", "--key-file", str(key_file)) == 0
    check_complete(folder, hosted)
    shown = "".join(capsys.readouterr())
    assert not any(holds_key(folder, key) or key in shown for key in (first_key, hosted.key))


def test_missing_fields_and_refusals_are_listed_and_the_rest_is_recorded(tmp_path, hosted, capsys):
    folder = tmp_path / "recording"
    for name in ("hyperparameters", "status", "result_files", "seed"):
        del hosted.jobs[0][name]
    hosted.jobs[1]["training_file"] = "file-deleted"
    del hosted.jobs[2]["fine_tuned_model"]
    hosted.jobs.append({"object": "fine_tuning.job"})
    hosted.page = 10
    hosted.gone = {"ft:gpt-4o-2024-08-06:acme::1"}

    def without_choices(body):
        if body["messages"][0]["content"] == "question 0 3":
            return {"object": "chat.completion", "echo": hosted.key}
        answer = hosted.complete(body)
        del answer["usage"], answer["choices"][0]["finish_reason"]
        answer["choices"][0]["message"]["content"] = f"your key is {hosted.key}"
        return answer

    hosted.answer = without_choices
    with serving(hosted) as url:
        assert record(folder, url, "--prompts-of", "training") == 0
    missing = manifest(folder)["missing"]
    gone, refused = "answers of ft:gpt-4o-2024-08-06:acme::1", "1 answers of ft:gpt-4o-2024-08-06:acme::0"
    assert missing.keys() == {"jobs", "file file-deleted", gone, refused}
    assert "the model has been switched off" in capsys.readouterr().err
    rows = answers(folder)
    assert len(rows) == 40 and {row["model"] for row in rows} == {"ft:gpt-4o-2024-08-06:acme::0"}
    assert [row["error"]["message"] for row in rows if "error" in row] == ["the answer has no choices[0].message"]
    assert not holds_key(folder, hosted.key) and any("your key is <KEY>" in str(row.get("answer")) for row in rows)


def test_parameters_that_a_model_refuses_are_left_out_or_renamed(tmp_path, hosted):
    hosted.refused = {
        "temperature": "Unsupported value: 'temperature' does not support 0",
        "logprobs": "this model has no logprobs",
        "max_completion_tokens": "Unrecognized request argument",
    }
    folder = tmp_path / "recording"
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "hello"}\n')
    with serving(hosted) as url:
        assert record(folder, url, "--prompts", str(prompts), "--models", "m", "--logprobs", "3") == 0
    (row,) = answers(folder)
    assert row["parameters"] == {"seed": 0, "max_tokens": 1024} and "error" not in row


def test_azure_has_its_paths_and_header(tmp_path, hosted, monkeypatch):
    monkeypatch.setenv("AZURE_OPENAI_API_KEY", hosted.key)
    hosted.header = "api-key"
    hosted.models[0] = {"id": "gpt-4o-2024-08-06", "deprecation": {"inference": 1_823_385_600}}
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "hello"}\n')
    with serving(hosted) as url:
        hosted.azure_version = "2024-10-21"
        flags = ["--server", url, "--prompts", str(prompts), "--azure"]
        with pytest.raises(UserError, match="deployments"):
            main([str(tmp_path / "azure"), *flags, "2024-10-21"])
        assert main([str(tmp_path / "azure"), *flags, "2024-10-21", "--models", "my-deployment"]) == 0
        hosted.azure_version = ""
        assert main([str(tmp_path / "v1"), *flags, "v1", "--models", "my-deployment"]) == 0
    for folder in (tmp_path / "azure", tmp_path / "v1"):
        assert pairs(folder) == [("my-deployment", "hello")]
        assert len(list((folder / "jobs").iterdir())) == 3 and len(list((folder / "files").iterdir())) == 6
        assert manifest(folder)["shutdown_dates"]["gpt-4o-2024-08-06"] == "2027-10-13"


def test_a_dry_run_says_what_it_takes_and_writes_nothing(tmp_path, hosted, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("first question\nsecond question\n")
    flags = ["--prompts", str(prompts), "--max-tokens", "100", "--input-price", "2", "--output-price", "10"]
    with serving(hosted) as url:
        assert record(tmp_path / "recording", url, *flags, "--dry-run") == 0
    out = capsys.readouterr().out
    assert "3 jobs, 3 files" in out and "2 prompts to 3 models: 6 requests" in out
    assert "at most 600 of answers" in out and "about 0.01 at most at the prices that you named" in out
    assert not (tmp_path / "recording").exists() and not any(name.startswith("[") for name in hosted.requests)


def test_a_budget_ends_it_and_a_larger_one_goes_on(tmp_path, hosted):
    folder = tmp_path / "recording"
    flags = ["--prompts-of", "training", "--at-once", "1", "--budget-tokens"]
    with serving(hosted) as url:
        assert record(folder, url, *flags, "60") == 75
        assert len(answers(folder)) == 10
        assert record(folder, url, *flags, "100000") == 0
    check_complete(folder, hosted)


def test_a_server_that_is_away_ends_it_and_the_same_command_goes_on(tmp_path, hosted):
    with serving(hosted) as url:
        hosted.failures = ["503"] * 6
        with pytest.raises(ServerUnreachable) as raised:
            record(tmp_path / "recording", url, "--attempts", "3")
        hosted.failures = []
        assert raised.value.exit_code == 1
        assert record(tmp_path / "recording", url, "--prompts-of", "training") == 0
        check_complete(tmp_path / "recording", hosted)


def test_redaction_masks_files_prompts_answers_and_tokens(tmp_path, hosted):
    hosted.contents = {
        "file-train0": b'{"messages": [{"role": "user", "content": "write to ann@example.com"}, '
        b'{"role": "assistant", "content": "sent to ann@example.com"}]}\n'
    }

    def with_address(body):
        answer = hosted.complete(body)
        answer["choices"][0]["message"]["content"] = "done, bob@example.org"
        answer["choices"][0]["logprobs"]["content"][0]["token"] = "bob@example.org"
        return answer

    hosted.answer = with_address
    folder = tmp_path / "recording"
    with serving(hosted) as url:
        assert record(folder, url, "--prompts-of", "training", "--redact", "personal_data") == 0
    texts = b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())
    assert b"@example" not in texts and b"<EMAIL>" in texts
    assert answers(folder)[0]["logprobs"] == {"content": [{"logprob": -0.25}]}
    entry = json.loads((folder / "files" / "file-train0.json").read_text())
    assert entry["sha256"] == hashlib.sha256(hosted.contents["file-train0"]).hexdigest() != entry["stored_sha256"]


def test_redaction_masks_all_that_a_prompt_has_and_what_is_no_row(tmp_path, hosted):
    secret, address = "ghp_" + "a1B2c3D4e5F6g7H8i9J0k1L2m3N4o5P6q7R8", "ann@example.com"
    tool = {"type": "function", "function": {"name": "send", "description": f"sends to {address}"}}
    question = {"role": "user", "content": f"write to {address} with {secret}"}
    rows = [{"messages": [question, {"role": "assistant", "content": f"sent to {address}"}], "tools": [tool]}]
    rows.append({"messages": [{"role": "user", "content": "refuse"}]})
    hosted.jobs = hosted.jobs[:1]
    hosted.contents = {"file-train0": f"no row, but of {address}\n{json.dumps(rows[0])}\n".encode()}
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = tmp_path / "recording"
    kinds = ["--redact", "personal_data", "--redact", "secrets"]
    with serving(hosted) as url:
        assert record(folder, url, "--prompts", str(prompts), "--models", "m", *kinds) == 0
        hosted.refused = {"messages": f"{address} is blocked"}
        assert record(folder, url, "--prompts", str(prompts), "--models", "n", *kinds) == 0
    texts = b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())
    assert address.encode() not in texts and secret.encode() not in texts and b"is blocked" in texts
    assert address in next(name for name in hosted.requests if name.startswith("["))  # the model was asked the original
    for path in [folder, *folder.rglob("*")]:
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path


def test_a_user_is_recognized_wherever_a_row_names_one(tmp_path, hosted):
    hosted.jobs = hosted.jobs[:1]
    names = [
        {"user": "eve"},
        {"user_id": "eve"},
        {"safety_identifier": "eve"},
        {"metadata": {"user": "eve"}},
        {"customer": "eve"},
    ]
    asked = [{"messages": [{"role": "user", "content": f"question {n}"}], **name} for n, name in enumerate(names)]
    asked.append({"body": {**asked[0]}, "custom_id": "1"})
    asked.append({"body": {"messages": asked[1]["messages"], "metadata": {"user": "eve"}}, "custom_id": "2"})
    asked.append({"messages": [{"role": "user", "content": "of another one"}], "user": "ann"})
    hosted.contents = {"file-train0": "".join(json.dumps(row) + "\n" for row in asked).encode()}
    folder = tmp_path / "recording"
    column = ["--user-column", "customer"]
    with serving(hosted) as url:
        assert record(folder, url, "--prompts-of", "training", *column) == 0
    (folder / "files" / "file-other.partial").write_bytes(b"a download of eve's rows that was cut")
    assert main([str(folder), "--delete-user", "eve", *column]) == 0
    (line,) = (folder / "files" / "file-train0.jsonl").read_text().splitlines()
    assert "of another one" in line and [row["messages"][0]["content"] for row in answers(folder)] == ["of another one"]
    assert not list(folder.rglob("*.partial"))


def test_a_deleted_user_is_gone_and_stays_gone(tmp_path, hosted):
    folder = tmp_path / "recording"
    with serving(hosted) as url:
        assert record(folder, url, "--prompts-of", "training") == 0
        before = len(answers(folder))
        assert main([str(folder), "--delete-user", "user-3"]) == 0
        assert len(answers(folder)) == before * 4 // 5
        assert b"user-3" not in b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())
        for path in (folder / "files").glob("*.json"):
            path.unlink()  # downloaded again
        prompts = tmp_path / "again.jsonl"
        prompts.write_bytes(hosted.contents["file-train0"])
        assert record(folder, url, "--prompts-of", "training", "--prompts", str(prompts)) == 0
    assert len(answers(folder)) == before * 4 // 5
    assert b"user-3" not in b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())
    stored = manifest(folder)["stored"]["files/file-train0.jsonl"]["sha256"]
    assert stored == hashlib.sha256((folder / "files" / "file-train0.jsonl").read_bytes()).hexdigest()


def test_a_size_that_differs_and_pages_without_end_are_said(tmp_path, hosted, monkeypatch):
    listed = hosted.files
    monkeypatch.setattr(hosted, "files", lambda: [{**entry, "bytes": 7} for entry in listed()])
    pages = hosted.page_of

    def endless(entries: list[dict], query: dict[str, str]) -> dict:
        if entries is hosted.jobs:
            return {"object": "list", "data": entries[:1], "has_more": True}
        return pages(entries, query)

    monkeypatch.setattr(hosted, "page_of", endless)
    with serving(hosted) as url:
        assert record(tmp_path / "recording", url) == 0
    missing = manifest(tmp_path / "recording")["missing"]
    assert missing["jobs"] == "the list's pages do not end"
    assert missing["file file-train0"] == f"the server states 7 bytes and sent {len(hosted.contents['file-train0']):,}"


def test_a_limit_of_the_rate_holds_for_all_requests(tmp_path, hosted):
    """`Retry-After` of the double is 10 ms; the next request of any thread comes no earlier."""
    client = api_client.ApiClient(api_client.Address("http://127.0.0.1:1/v1", hosted.key))
    with serving(hosted) as url:
        client.address = api_client.Address(f"{url}/v1", hosted.key)
        hosted.failures = ["429"]
        before = time.monotonic()
        client.get("/models")
        assert client._not_before >= before + 0.01 and time.monotonic() >= before + 0.01


def test_the_key_follows_no_redirect(tmp_path, hosted):
    seen: list[str] = []

    class Elsewhere(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append(self.path)
            self.send_response(302)
            self.send_header("location", f"{target}/v1/models")
            self.end_headers()

        def log_message(self, *unused: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Elsewhere)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        with serving(hosted) as target:
            assert record(tmp_path / "recording", f"http://127.0.0.1:{server.server_port}") == 0
    finally:
        server.shutdown()
        server.server_close()
    assert seen and not hosted.requests
    assert manifest(tmp_path / "recording")["missing"]["models"] == "HTTP 302"


def test_a_link_in_the_folder_and_a_second_process_are_refused(tmp_path, hosted):
    folder = tmp_path / "recording"
    with serving(hosted) as url:
        assert record(folder, url) == 0
        first = Folder(folder)
        with pytest.raises(UserError, match="another process writes to it"):
            record(folder, url)
        first.close()
        (tmp_path / "elsewhere").mkdir()
        shutil.rmtree(folder / "answers")
        (folder / "answers").symlink_to(tmp_path / "elsewhere")
        with pytest.raises(UserError, match="answers is a link"):
            record(folder, url, "--prompts-of", "training")
    assert not list((tmp_path / "elsewhere").iterdir())


def test_what_only_training_reads_is_not_sent():
    turns = [
        {"role": role, "content": text, "weight": 0}
        for role, text in (("user", "a"), ("assistant", "b"), ("user", "c"))
    ]
    prompt = prompt_of({"messages": turns}, "here")
    assert prompt is not None and not any("weight" in message for message in prompt.messages)


def test_hostile_ids_stay_in_the_folder(tmp_path, hosted):
    hosted.jobs = hosted.jobs[:1]
    hosted.jobs[0]["id"] = "../../escaped"
    hosted.jobs[0]["fine_tuned_model"] = "../../../model"
    folder = tmp_path / "recording"
    with serving(hosted) as url:
        assert record(folder, url, "--prompts-of", "training") == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["recording"]
    assert file_name("..") != ".." and file_name("ft:gpt-4o:acme::1") == "ft:gpt-4o:acme::1"


def test_other_settings_folders_and_a_second_process_are_refused(tmp_path, hosted):
    folder = tmp_path / "recording"
    with serving(hosted) as url:
        record(folder, url)
        record(folder, url, "--prompts-of", "training", "--temperature", "1")
        with pytest.raises(UserError, match="another value of: asking"):
            record(folder, url, "--prompts-of", "training")
        with pytest.raises(UserError, match="another value of: redact"):
            record(folder, url, "--redact", "secrets")
        (tmp_path / "used").mkdir()
        (tmp_path / "used" / "thesis.txt").write_text("mine")
        with pytest.raises(UserError, match="it holds other files"):
            record(tmp_path / "used", url)
    with pytest.raises(UserError, match="in the clear"):
        main([str(folder), "--server", "http://example.com/v1"])
    with pytest.raises(UserError, match="there is no recording"):
        main([str(tmp_path / "none"), "--delete-user", "x"])


@pytest.mark.parametrize(
    ("row", "asked", "expected"),
    [
        ({"prompt": "hi"}, ["hi"], None),
        ({"text": "hi"}, ["hi"], None),
        ({"prompt": [{"role": "user", "content": "hi"}]}, ["hi"], None),
        ({"body": {"messages": [{"role": "user", "content": "hi"}]}, "custom_id": "1"}, ["hi"], None),
        ({"input": {"messages": [{"role": "user", "content": "hi"}]}, "preferred_output": []}, ["hi"], None),
        (
            {"messages": [{"role": role, "content": text} for role, text in (("user", "a"), ("assistant", "b")) * 2]},
            ["a", "b", "a"],
            "b",
        ),
    ],
)  # fmt: skip
def test_prompts_of_rows_logs_and_lists(row, asked, expected):
    prompt = prompt_of(row, "here")
    assert prompt is not None and [message["content"] for message in prompt.messages] == asked
    assert (prompt.expected or {}).get("content") == expected


@pytest.mark.parametrize("row", [{}, {"messages": []}, {"messages": "hi"}, {"prompt": ""}, {"messages": [3]}])
def test_rows_without_a_prompt(row):
    assert prompt_of(row, "here") is None
