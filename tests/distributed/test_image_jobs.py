"""Rows with images through the fine-tuning API by the official client: trained, proven, and asked with an image."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.cloud_server import Server, wait_for
from tests.support.command import Commands
from tests.support.sight import draw, save
from tests.unit.test_image_rows import file_of

SETTINGS = {"trainer": {"precision": "fp32", "micro_batch_size": 2}, "data": {"workers": 1}, "zero": {"stage": 0}}


def shown(number: int) -> list[dict[str, Any]]:
    url = (
        "data:image/png;base64,"
        + base64.b64encode(file_of(draw(number, (60, 40) if number % 2 else (32, 32)))).decode()
    )
    return [{"type": "text", "text": "w1"}, {"type": "image_url", "image_url": {"url": url, "detail": "auto"}}]


def write_rows(path: Path, *changes: dict[str, Any]) -> Path:
    rows = [
        {"messages": [{"role": "user", "content": shown(number)}, {"role": "assistant", "content": f"w{number} w2"}]}
        for number in range(10)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, *changes]))
    return path


@pytest.mark.timeout(900)
def test_from_rows_with_images_to_an_answer_about_one(tmp_path: Path) -> None:
    base = save("qwen2_vl", tmp_path / "base")
    adaptation = {"name": "lora", "rank": 4}
    tiny = {"path": str(base), "adaptation": adaptation, "learning_rate": {"supervised": 0.01}, "max_length": 256}
    presets = {"models": {"tiny": {**tiny, "settings": SETTINGS}}}
    with Server(tmp_path, presets, f"tiny={base}") as server:
        client = server.client()

        def job_of(file: Path) -> Any:
            uploaded = client.files.create(file=file, purpose="fine-tune").id
            return client.fine_tuning.jobs.create(model="tiny", training_file=uploaded, hyperparameters={"n_epochs": 1})

        address = {"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}
        bad = {"messages": [{"role": "user", "content": [address]}, {"role": "assistant", "content": "w2"}]}
        failed = wait_for(client, job_of(write_rows(tmp_path / "bad.jsonl", bad)).id, "failed")
        assert (
            "line 11: messages[0].content[0].image_url.url: is an address, and nothing is fetched"
            in failed.error.message
        )

        job = wait_for(client, job_of(write_rows(tmp_path / "rows.jsonl")).id, "succeeded")
        asked = [{"role": "user", "content": shown(3)}]
        answer = client.chat.completions.create(model=job.fine_tuned_model, messages=asked, max_tokens=5, temperature=0)
        export = next((server.job_folder(job.id) / "models").glob("step-*"))
        (tmp_path / "asked.jsonl").write_text(json.dumps({"messages": asked}) + "\n")
        words = ["generate", str(export), "--input", "asked.jsonl", "--max-new-tokens", "5", "--json"]
        generated = Commands(tmp_path).run(*words)
        assert json.loads(generated.stdout)["answer"] == answer.choices[0].message.content.strip(), generated.stderr
        log = (tmp_path / "server.log").read_text()
        (proof,) = (line for line in log.splitlines() if f"{job.fine_tuned_model} is proven: 8 rows" in line)
        assert "8 of these rows show images" in proof
        assert "base64" not in log + (server.state / "logs" / "local.log").read_text()
