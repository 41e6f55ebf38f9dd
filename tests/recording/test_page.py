"""The commands of docs/hosted-models.md, run as they are except for the address."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

from dstune.recording.command import main
from tests.support.hosted_double import Hosted, serving

PAGE = Path(__file__).parents[2] / "docs" / "hosted-models.md"


def commands() -> list[list[str]]:
    blocks = re.findall(r"```bash\n(.*?)```", PAGE.read_text(), re.DOTALL)
    return [shlex.split(line) for block in blocks for line in block.splitlines()]


def test_the_commands_of_the_page(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    openai, azure = Hosted(), Hosted(key="azure-key-0123456789")
    openai.jobs[0]["validation_file"] = "file-train1"
    azure.header, azure.azure_version = "api-key", "2024-10-21"
    monkeypatch.setenv("OPENAI_API_KEY", openai.key)
    monkeypatch.setenv("AZURE_OPENAI_API_KEY", azure.key)
    row = {"messages": [{"role": "user", "content": "from a log"}], "user": "customer-17"}
    Path("logs.jsonl").write_text(json.dumps(row) + "\n")
    with serving(openai) as url, serving(azure) as azure_url:
        servers = {"https://api.openai.com/v1": f"{url}/v1", "https://my-resource.openai.azure.com": azure_url}
        for program, verb, *words in commands():
            assert (program, verb) == ("dstune", "record")
            before = len(openai.requests)
            assert main([servers.get(word, word) for word in words]) == 0
            if "--dry-run" in words:
                assert not Path("recording").exists() and len(openai.requests) > before
    manifest = json.loads(Path("recording/manifest.json").read_text())
    assert manifest["complete"] and len(list(Path("recording/jobs").iterdir())) == 3
    answers = Path("recording/answers/ft:gpt-4o-2024-08-06:acme::0.jsonl").read_text()
    assert len(answers.splitlines()) == 20 and "from a log" not in answers
    assert "from a log" in Path("recording-azure/answers/my-deployment.jsonl").read_text()
    assert "3 rows and answers of this user are deleted" in capsys.readouterr().out
