"""The commands of docs/migrating.md do what the page says, in order, with published examples under its file names."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from operator import attrgetter
from pathlib import Path

from dstune.cli import main
from dstune.config.compose import compose
from dstune.config.plain_file import expand
from dstune.config.validate import validate

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "migrating.md").read_text(encoding="utf-8")
FILES = {
    "qlora-1b.yml": "imports/axolotl/llama3_qlora_1b.yaml",
    "ds_config.json": "deepspeed/trainer_zero2.json",
    "accelerate.yaml": "deepspeed/accelerate_zero3.yaml",
}


def test_commands_of_the_page(tmp_path, monkeypatch, capsys):
    for name, example in FILES.items():
        shutil.copy(ROOT / "tests" / "data" / example, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    # Those with a checkpoint are run by tests/parity/test_half_finished.py.
    before, after = PAGE.split("## Continue another tool's half-finished run")
    blocks = re.findall(r"```bash\n(.*?)```", before + after.partition("\n## ")[2], re.DOTALL)
    commands = [shlex.split(line) for block in blocks for line in block.splitlines()]
    assert len(commands) == 5
    for program, verb, *arguments in commands:
        assert program == "dstune"
        if verb == "import":
            assert main([verb, *arguments]) == 0
            continue
        assert verb == "train"
        folders = []
        if arguments[0] == "--config-dir":
            _, folder, *arguments = arguments
            folders = [folder]
        # The files leave precision and buckets to dstune; what chat_lora gives does not contradict them.
        validate(compose(arguments, folders).config)
    assert "dataset_prepared_path" in capsys.readouterr().out


def test_files_and_kinds_of_the_page_are_those_of_the_code():
    from dstune.importing.files import TOOLS
    from dstune.importing.result import DIFFERENT, MEANINGLESS, NOT_SUPPORTED

    text = " ".join(PAGE.split())
    assert all(f"`{name}`" in text or f"--from {name}" in text for name in TOOLS)
    assert all(f"*{kind}*" in text for kind in (DIFFERENT, MEANINGLESS, NOT_SUPPORTED))


SIDE_BY_SIDE = (
    *("model.path", "method.name", "method.rank", "method.alpha", "method.dropout", "data.train", "data.max_length"),
    *("data.packing", "optimizer.lr", "schedule.name", "schedule.warmup_ratio", "trainer.epochs", "trainer.precision"),
    *("trainer.global_batch_size", "trainer.micro_batch_size", "trainer.activation_checkpointing", "run.dir"),
)


def settings(config: object) -> dict[str, object]:
    return {key: attrgetter(key)(config) for key in SIDE_BY_SIDE}


def test_the_runs_side_by_side_are_the_same(tmp_path, monkeypatch):
    """The files of the page, imported, are the configuration that stands beside them."""
    monkeypatch.chdir(tmp_path)
    inside = PAGE.split("## The same run, side by side")[1].split("## Names of keys in each tool")[0]
    own, *others = re.findall(r"```(?:yaml|sh)\n(.*?)```", inside, re.DOTALL)
    assert len(others) == 3
    Path("my.yaml").write_text(own)
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    Path("chats.jsonl").write_text(json.dumps(row))
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    described = {
        "file_name": "chats.jsonl",
        "formatting": "sharegpt",
        "columns": {"messages": "messages"},
        "tags": tags,
    }
    Path("dataset_info.json").write_text(json.dumps({"chats": described}))
    expected = settings(compose(expand(["my.yaml"])).config)
    for name, content in zip(("axolotl.yml", "llamafactory.yaml", "sft.sh"), others, strict=True):
        Path(name).write_text(content)
        stem = name.partition(".")[0]
        assert main(["import", name, "--output", f"mine/experiment/{stem}.yaml"]) == 0
        assert settings(compose([f"experiment={stem}"], ["mine"]).config) == expected, name
