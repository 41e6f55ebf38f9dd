"""The guides name files and goals that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
GUIDES = ("CONTRIBUTING.md", "docs/architecture.md")


@pytest.mark.parametrize("guide", GUIDES)
def test_named_files_exist(guide: str) -> None:
    text = (ROOT / guide).read_text(encoding="utf-8")
    named = set(
        re.findall(r"`((?:dstune|tests|docs|conf|benchmarks|launch|docker)/[\w/.-]*|[\w-]+\.(?:toml|md))`", text)
    )
    assert named or guide != "CONTRIBUTING.md"
    # Where a guide says `conf/model/NAME.yaml`, the folder has to be there.
    paths = {name: ROOT / name.partition("NAME")[0] for name in named}
    assert [name for name, path in sorted(paths.items()) if not path.exists()] == []


def test_named_scripts_and_tests_exist() -> None:
    """A test or a measurement that was renamed holds nothing any more."""
    named = {
        (page.name, path)
        for page in (ROOT / "docs").rglob("*.md")
        for path in re.findall(
            r"(?<![\w/.-])(?:tests|benchmarks|dstune)/[\w/-]+\.py\b", page.read_text(encoding="utf-8")
        )
    }
    assert len(named) > 100
    assert [(page, path) for page, path in sorted(named) if not (ROOT / path).is_file()] == []


def test_named_goals_exist() -> None:
    goals = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for guide in ("CONTRIBUTING.md", "README.md", "CHANGELOG.md"):
        text = (ROOT / guide).read_text(encoding="utf-8")
        named = set(re.findall(r"(?:^|`)make ([a-z][\w-]*)", text, re.MULTILINE))
        assert named <= goals, f"{guide} names {named - goals}"


def test_named_functions_exist() -> None:
    """`trainer/loop.py: write_row`, of the package where no folder of the repository begins the path."""
    named = {
        (guide.name, path, name)
        for guide in [*(ROOT / "docs").rglob("*.md"), ROOT / "CONTRIBUTING.md"]
        for path, names in re.findall(r"`([\w/]+\.py): ([\w.]+(?:, [\w.]+)*)`", guide.read_text(encoding="utf-8"))
        for name in names.split(", ")
    }
    assert len(named) > 10
    for guide, path, name in sorted(named):
        files = [file for file in (ROOT / path, ROOT / "dstune" / path) if file.is_file()]
        assert files, f"{guide} names {path}"
        defined = re.search(rf"\b(?:def|class) {name.rpartition('.')[2]}\b", files[0].read_text(encoding="utf-8"))
        assert defined, f"{guide} names {name} in {path}"
