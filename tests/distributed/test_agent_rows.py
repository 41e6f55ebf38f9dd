"""The agent of examples/agent, from its rows to a server: SmolLM2 learns them under three chat templates, and what serves it is
held against the training."""

from __future__ import annotations

import json
import os
import runpy
import signal
import socket
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from support.command import ROOT, Commands

from dstune.core.errors import UserError
from dstune.samples import resolve

TEMPLATES = ("chatml", "mistral", "mistral_tekken")
ROWS: list[dict[str, Any]] = runpy.run_path(str(ROOT / "examples" / "agent" / "rows.py"))["rows"](200)
SHORT = (
    *("method=lora", "method.rank=4", "optimizer.lr=1e-3", "data.max_length=1024", "data.packing=false"),
    *("data.split.validation=0.02", "trainer.max_steps=2", "trainer.global_batch_size=1", "trainer.micro_batch_size=1"),
    *("evaluate.max_rows=1", "evaluate.every=0", "evaluate.at_start=false", "checkpoint.every=0", "launch.processes=1"),
)


def test_the_rows_are_those_of_an_agent_and_the_same_every_time(tmp_path: Path) -> None:
    turns = [[message for message in row["messages"] if message["role"] == "assistant"] for row in ROWS]
    assert len({json.dumps(row) for row in ROWS}) == 200
    assert {len(of_row) for of_row in turns} == {2, 3, 4}, "one to three steps and an answer"
    assert all(message["reasoning_content"] for of_row in turns for message in of_row)
    assert all(len(of_row[0]["tool_calls"]) == 2 for of_row in turns), "the first step asks for both cities at once"
    for row in ROWS:
        called = [call["id"] for message in row["messages"] for call in message.get("tool_calls", ())]
        assert called == [message["tool_call_id"] for message in row["messages"] if message["role"] == "tool"]
    again = runpy.run_path(str(ROOT / "examples" / "agent" / "rows.py"))["rows"](200)
    assert again == ROWS


def fetch_json(port: int, key: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    data = None if body is None else json.dumps(body).encode()
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data, headers)
    with urllib.request.urlopen(request, timeout=300) as answer:
        found: dict[str, Any] = json.load(answer)
    return found


def models_of(port: int, state: Path, process: Any, commands: Commands) -> tuple[str, list[dict[str, Any]]]:
    """The key, and the models once the server has proven them."""
    deadline = time.monotonic() + 900
    while time.monotonic() < deadline:
        assert process.poll() is None, commands.log
        try:
            key = (state / "key").read_text().strip()
            return key, fetch_json(port, key, "/v1/models")["data"]
        except (OSError, urllib.error.URLError):
            time.sleep(1)
    raise AssertionError(commands.log)


@pytest.mark.slow
@pytest.mark.parametrize("template", TEMPLATES)
def test_an_agent_is_trained_exported_served_and_proven(tmp_path: Path, template: str) -> None:
    try:
        resolve("sample://smollm2", fetch=False)
    except UserError:
        pytest.skip("needs the sample model: dstune samples smollm2")
    commands = Commands(tmp_path)
    commands.env["DSTUNE_CACHE"] = os.environ.get("DSTUNE_CACHE", str(Path.home() / ".cache" / "dstune"))
    rows = tmp_path / "agent.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    run = tmp_path / "run"
    given = ("model=smollm2", f"model.chat_template={template}", f"data.train={rows}", *SHORT, f"run.dir={run}")
    trained = commands.run("train", *given, timeout=1800)
    assert trained.returncode == 0, trained.stdout + trained.stderr
    report = json.loads((run / "data_report.json").read_text())
    report = report.get("parts", report)
    assert report["train"]["rows"] + report["validation"]["rows"] == 200
    assert report["train"]["bad_rows"] == report["train"]["truncated"] == report["train"]["dropped"] == 0

    exported = commands.run("export", str(run), "--out", str(tmp_path / "agent"), timeout=900)
    assert exported.returncode == 0, exported.stderr
    checked = commands.run("serve", str(tmp_path / "agent"), "--check", "--require-proof", timeout=900)
    assert checked.returncode == 0, checked.stdout + checked.stderr

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = commands.start("serve", str(tmp_path / "agent"), "--port", str(port), "--state", "state")
    try:
        key, models = models_of(port, tmp_path / "state", process, commands)
        (agent,) = [model for model in models if model["id"] == "agent"]
        assert agent["parity"]["status"] == "proven", agent
        question = {"messages": ROWS[0]["messages"][:2], "tools": ROWS[0]["tools"], "max_tokens": 4}
        answer = fetch_json(port, key, "/v1/chat/completions", {"model": "agent", **question})
        assert answer["usage"]["completion_tokens"] == 4
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)
