"""The commands of docs/hosted-models.md, run as they are except for the address."""

from __future__ import annotations

import functools
import json
import re
import shlex
from pathlib import Path

from dstune.recording import command, compare, retrain
from tests.support.hosted_double import Hosted, serving
from tests.support.served_runs import save_run
from tests.support.tiny import save_decoder

PAGE = Path(__file__).parents[2] / "docs" / "hosted-models.md"
COMPARISONS = ("comparison", "comparison-servers")


def commands() -> list[list[str]]:
    blocks = re.findall(r"```bash\n(.*?)```", PAGE.read_text(), re.DOTALL)
    return [shlex.split(line) for block in blocks for line in block.splitlines()]


def row(number: int) -> dict:
    question = {"role": "user", "content": f"log {number} of a customer"}
    answer = {"role": "assistant", "content": f"answer to log {number} of a customer"}
    return {"messages": [question, answer], "user": f"customer-{number}"}


def right(service: Hosted, body: dict) -> dict:
    completion = service.complete(body)
    completion["choices"][0]["message"]["content"] = f"answer to {body['messages'][0]['content']}"
    return completion


def test_the_commands_of_the_page(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    openai, azure, local = Hosted(), Hosted(key="azure-key-0123456789"), Hosted(jobs=0, key="local-key-0123456789")
    for service in (openai, azure, local):
        service.answer = functools.partial(right, service)
    openai.jobs[0]["validation_file"] = "file-train1"
    azure.header, azure.azure_version = "api-key", "2024-10-21"
    monkeypatch.setenv("OPENAI_API_KEY", openai.key)
    monkeypatch.setenv("AZURE_OPENAI_API_KEY", azure.key)
    monkeypatch.setenv("DSTUNE_API_KEY", local.key)
    Path("logs.jsonl").write_text("".join(json.dumps(row(number)) + "\n" for number in range(220)))
    save_run(Path("runs/ftjob-0"), save_decoder(tmp_path / "base"), Path("logs.jsonl"), "task=chat", "method=lora")
    verbs = {"record": command.main, "compare": compare.main, "retrain": retrain.main}
    with serving(openai) as url, serving(azure) as azure_url, serving(local) as local_url:
        servers = {"https://api.openai.com/v1": f"{url}/v1", "https://my-resource.openai.azure.com": azure_url}
        servers["http://localhost:8000/v1"] = f"{local_url}/v1"
        for program, verb, *words in commands():
            assert program == "dstune"
            before = len(openai.requests)
            worse = "runs/ftjob-0" in words  # its weights are random here
            assert verbs[verb]([servers.get(word, word) for word in words]) == int(worse)
            if "--dry-run" in words:
                assert not Path("recording").exists() and len(openai.requests) > before
    assert "model: qwen3_8b" in Path("support.yaml").read_text()
    manifest = json.loads(Path("recording/manifest.json").read_text())
    assert manifest["complete"] and len(list(Path("recording/jobs").iterdir())) == 3
    answers = Path("recording/answers/ft:gpt-4o-2024-08-06:acme::0.jsonl").read_text()
    assert len(answers.splitlines()) == 20 + 219 and "log 17 " not in answers
    verdicts = [json.loads(Path(f"{name}/comparison.json").read_text())["verdict"] for name in COMPARISONS]
    assert verdicts == ["worse", "passed"]
    assert "log 17 " in Path("recording-azure/answers/my-deployment.jsonl").read_text()
    assert "3 rows and answers of this user are deleted" in capsys.readouterr().out
