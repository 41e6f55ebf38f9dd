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


def test_named_goals_exist() -> None:
    goals = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for guide in ("CONTRIBUTING.md", "README.md", "CHANGELOG.md"):
        text = (ROOT / guide).read_text(encoding="utf-8")
        named = set(re.findall(r"(?:^|`)make ([a-z][\w-]*)", text, re.MULTILINE))
        assert named <= goals, f"{guide} names {named - goals}"
