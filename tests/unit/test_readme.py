"""The README and the guides say what is true: commands compose, verbs and flags exist, tables are the schema's."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from dstune.cli import VERBS
from dstune.config.compose import compose
from dstune.config.documentation import documentation
from dstune.config.hydra_session import config_folders
from dstune.config.sweep_space import first, split
from dstune.config.validate import validate
from dstune.protocols import METHODS
from tools.guides import configuration_page
from tools.methods_page import methods_page
from tools.presets_page import presets_page

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
GUIDES = tuple(
    ROOT / "docs" / f"{name}.md"
    for name in (
        "recipes",
        "tracking",
        "export",
        "methods",
        "evaluation",
        "memory",
        *(f"tasks/{page.stem}" for page in sorted((ROOT / "docs" / "tasks").glob("*.md"))),
        "planning",
        "adapters",
        "clusters",
        "survival",
        "data",
        "sweeps",
        "start/install",
        "start/first-fine-tune",
        "start/how-much",
        "start/choose",
        "distillation",
        "experts",
        "images",
        "long-rows",
        "models",
        "offloading",
        "optimizers",
        "scaling",
        "tensor-parallel",
    )
)
"""Their commands are checked as the README's are."""


def commands() -> list[list[str]]:
    text = "\n".join([README, *(guide.read_text(encoding="utf-8") for guide in GUIDES)])
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.strip()]


def arguments_of_train(command: list[str]) -> list[str] | None:
    if "train" not in command:
        return None
    return command[command.index("train") + 1 :]


TRAIN = [arguments for arguments in map(arguments_of_train, commands()) if arguments is not None]


@pytest.mark.parametrize("arguments", TRAIN, ids=" ".join)
def test_every_train_command_composes(arguments, tmp_path):
    overrides = [word for word in arguments if "=" in word and not word.startswith("-")]
    if "-m" in arguments:
        found = split(overrides, {})
        overrides = [*found.fixed, *first(found.axes).overrides]
    if any(word.startswith("plugins=") for word in overrides):
        compose_with_plugins(overrides, tmp_path)
    else:
        validate(compose(overrides).config)


def compose_with_plugins(overrides: list[str], folder: Path) -> None:
    """Compose and validate a command line in a process of its own, in a folder with the files that the docs say to save: what a
    plugin registers stays in its process."""
    pages = "\n".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs").rglob("*.md"))
    for program in re.findall(r"```python\n(# \w+\.py\n.*?)```", pages, re.DOTALL):
        (folder / program.split()[1]).write_text(program, encoding="utf-8")
    imports = "import sys; from dstune.config.compose import compose; from dstune.config.validate import validate"
    words = [sys.executable, "-c", f"{imports}; validate(compose(sys.argv[1:]).config)", *overrides]
    finished = subprocess.run(words, cwd=folder, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr


def test_every_command_is_one_that_exists():
    goals = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for command in commands():
        if command[0] == "make":
            assert command[-1] in goals
        elif command[0] == "dstune":
            assert command[1] in VERBS
        elif command[0] == "eval":
            assert command[1] == "$(dstune completion bash)"
        elif command[0] == "source":
            assert command[1] == ".venv/bin/activate"  # which `make quickstart` makes
        else:
            assert command[0] in {"pip", "deepspeed", "srun", "mpirun", "python", "python3"}
    assert len(TRAIN) >= 8


def test_flags_of_export_and_generate_exist():
    from dstune.inference import export_command, generate, predict

    read = {
        "export": export_command._parser().parse_args,
        "generate": generate._parser().parse_args,
        "predict": predict._parse,
    }
    found = [command for command in commands() if command[0] == "dstune" and command[1] in read]
    assert len(found) >= 13
    for command in found:
        read[command[1]](command[2:])  # raises where a flag does not exist


def test_commands_of_report_and_data_show_are_understood():
    from dstune.launch import train
    from dstune.report import command as report
    from dstune.show import command as show

    reports = [command[2:] for command in commands() if command[:2] == ["dstune", "report"]]
    shows = [command[3:] for command in commands() if command[:3] == ["dstune", "data", "show"]]
    assert len(reports) >= 2
    assert len(shows) >= 2
    for arguments in reports:
        report._parser().parse_args(arguments)
    for arguments in shows:
        _, rest = show._parse(arguments)
        overrides = [word for word in rest if "=" in word]
        assert not train.hydra_flags(overrides).shows
        assert len(rest) - len(overrides) <= 1, "the PATH of a run"
        validate(compose(overrides).config)


def test_page_of_presets_is_that_of_the_files():
    text = (ROOT / "docs" / "presets.md").read_text(encoding="utf-8")
    assert text == presets_page(config_folders()), "run python tools/guides.py"


def test_page_of_methods_is_that_of_schema_files_and_measurements():
    text = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    assert text == methods_page(ROOT), "run python tools/guides.py"
    for name in METHODS:
        assert f"## `method={name}`" in text
        assert (ROOT / "conf" / "method" / f"{name}.yaml").is_file()


def test_configuration_reference_is_that_of_the_schema():
    text = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert text == configuration_page(), "run python tools/guides.py"
    assert not [f"{setting.group}.{setting.key}" for setting in documentation() if not setting.doc]
