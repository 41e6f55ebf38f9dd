"""The workflows run what the repository has, and a release is the tag's version."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from dstune import __version__

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / ".github" / "workflows"


def steps(name: str) -> dict[str, list[dict]]:
    workflow = yaml.safe_load((FOLDER / name).read_text(encoding="utf-8"))
    return {job: content["steps"] for job, content in workflow["jobs"].items()}


def test_continuous_integration_is_the_command_of_developers() -> None:
    (commands,) = ([step.get("run", "") for step in own] for own in steps("ci.yml").values())
    assert commands[-1] == ".ci/run"
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111
    versions = yaml.safe_load((FOLDER / "ci.yml").read_text())["jobs"]["run"]["strategy"]["matrix"]["python"]
    least = re.search(r'requires-python = ">=([\d.]+)"', (ROOT / "pyproject.toml").read_text())
    assert least is not None and versions[0] == least[1]


def test_the_version_is_read_as_the_release_reads_it() -> None:
    command = next(
        step["run"] for step in steps("release.yml")["build"] if step.get("name") == "The tag is the version"
    )
    pattern = re.search(r"s/\^(.*?)\\\(\.\*\\\)", command)
    assert pattern is not None
    lines = [line for line in (ROOT / "dstune" / "__init__.py").read_text().splitlines() if line.startswith(pattern[1])]
    assert lines == [f'{pattern[1]}{__version__}"']


def test_every_image_has_its_file_and_only_the_publisher_may_publish() -> None:
    workflow = yaml.safe_load((FOLDER / "release.yml").read_text(encoding="utf-8"))
    images = workflow["jobs"]["images"]["strategy"]["matrix"]["image"]
    assert {f"Dockerfile.{image}" for image in images} == {file.name for file in (ROOT / "docker").glob("Dockerfile.*")}
    rights = {job: content.get("permissions", workflow["permissions"]) for job, content in workflow["jobs"].items()}
    assert [job for job, own in rights.items() if own.get("id-token") == "write"] == ["publish"]
    assert workflow["jobs"]["publish"]["environment"] == "pypi"
