"""The built packages: what is in them, and that an installed `dstune` works anywhere."""

from __future__ import annotations

import ast
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))

# The clean environment of a user: this checkout must not leak into it.
CLEAN = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}


def run(*command: str | Path, cwd: Path, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    """The finished command; its output is in the failure's message when it did not exit 0."""
    done = subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env=CLEAN | {"HOME": str(cwd)},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, f"{command} exited {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


@dataclass(frozen=True)
class Built:
    source: Path
    sdist: Path
    wheel: Path


def build(source: Path, kind: str, target: Path) -> Path:
    """Build a `wheel` or an `sdist` of `source` with the setuptools of this environment: nothing is downloaded."""
    script = f"from setuptools import build_meta; print(build_meta.build_{kind}({str(target)!r}))"
    return target / run(sys.executable, "-c", script, cwd=source).stdout.split()[-1]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """Sdist and wheel of a copy of the tree, so that no `build/` of an earlier build adds stale files."""
    source = tmp_path_factory.mktemp("build") / "dstune"
    ignored = (".git", ".venv", "runs", "build", "dist", "wandb", "*.egg-info", "__pycache__", ".*_cache")
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(*ignored))
    target = tmp_path_factory.mktemp("dist")
    return Built(source, build(source, "sdist", target), build(source, "wheel", target))


@pytest.fixture(scope="module")
def wheel_names(built: Built) -> set[str]:
    with zipfile.ZipFile(built.wheel) as archive:
        return set(archive.namelist())


def test_every_folder_with_modules_is_a_package() -> None:
    without_init = {
        path.parent for path in (ROOT / "dstune").rglob("*.py") if not (path.parent / "__init__.py").is_file()
    }
    assert not without_init, "a folder with modules needs an __init__.py to be packaged"


def test_the_wheel_has_every_file_of_the_package(wheel_names: set[str]) -> None:
    files = {
        path
        for package in ("dstune", "dstune_plugins", "dstune_verify")
        for path in (ROOT / package).rglob("*.*")
        if path.is_file()
    }
    configuration = {f"dstune/{path.relative_to(ROOT)}" for path in (ROOT / "conf").rglob("*.yaml")}
    assert files and configuration
    expected = {str(path.relative_to(ROOT)) for path in files if path.suffix != ".pyc"}
    expected |= configuration | {"dstune/conf/__init__.py"}
    assert {name for name in wheel_names if ".dist-info/" not in name} == expected


def test_the_wheel_names_its_licence_and_command(built: Built, wheel_names: set[str]) -> None:
    with zipfile.ZipFile(built.wheel) as archive:
        (metadata,) = (archive.read(name).decode() for name in wheel_names if name.endswith(".dist-info/METADATA"))
        (commands,) = (archive.read(name).decode() for name in wheel_names if name.endswith("entry_points.txt"))
    assert "License-Expression: Apache-2.0" in metadata
    assert any(name.endswith("licenses/LICENSE") for name in wheel_names)
    assert "dstune = dstune.cli:main" in commands


def test_the_sdist_builds_the_same_wheel(built: Built, wheel_names: set[str], tmp_path: Path) -> None:
    with tarfile.open(built.sdist) as archive:
        archive.extractall(tmp_path, filter="data") if hasattr(tarfile, "data_filter") else archive.extractall(tmp_path)
    (unpacked,) = tmp_path.iterdir()
    for name in ("LICENSE", "README.md", "CHANGELOG.md", "Makefile", "tests/packaging/test_distribution.py"):
        assert (unpacked / name).is_file(), f"{name} is missing in the sdist"
    again = build(unpacked, "wheel", tmp_path)
    with zipfile.ZipFile(again) as archive:
        assert set(archive.namelist()) == wheel_names


def check_installed(python: Path, folder: Path) -> None:
    """The verbs that need no run, from an empty folder: the answers come from the installed package."""
    dstune = python.with_name("dstune")
    where = run(
        python, "-c", "import dstune, dstune.conf; print(dstune.__file__, dstune.conf.__file__)", cwd=folder
    ).stdout
    assert str(ROOT) not in where.replace(str(python.parents[1]), ""), f"not the installed package: {where}"
    assert "train" in run(dstune, "--help", cwd=folder).stdout
    composed = run(dstune, "train", "--cfg", "job", cwd=folder).stdout
    assert "sample://smollm2" in composed and re.search(r"^zero:$", composed, re.MULTILINE)
    listed = json.loads(run(dstune, "samples", "--json", cwd=folder).stdout)
    assert "sample://smollm2" in [sample["uri"] for sample in listed]
    assert "sample://smollm2" in run(python, "-m", "dstune", "train", "--cfg", "job", cwd=folder).stdout
    own = folder / "own"
    (own / "experiment").mkdir(parents=True)
    (own / "experiment" / "mine.yaml").write_text(
        "# @package _global_\ndefaults: [quickstart]\ntrainer: {max_steps: 3}\n"
    )
    (own / "axolotl.yml").write_text(
        "base_model: sample://smollm2\ndatasets: [{path: sample://chitchat, type: chat_template}]\n"
    )
    imported = ("import", own / "axolotl.yml", "--output", own / "experiment" / "axolotl.yaml")
    assert "experiment=axolotl" in run(dstune, *imported, cwd=folder).stdout
    mine = ("--config-dir", own, "experiment=mine")
    assert "max_steps: 3\n" in run(dstune, "train", *mine, "--cfg", "job", "-p", "trainer", cwd=folder).stdout
    assert {path.name for path in folder.iterdir()} <= {".cache", "own"}, "nothing is written into the working folder"


def test_an_installed_wheel_works_from_an_empty_folder(built: Built, tmp_path: Path) -> None:
    """In an environment of its own that borrows the dependencies of this one."""
    environment = tmp_path / "venv"
    run(sys.executable, "-m", "venv", "--without-pip", environment, cwd=tmp_path)
    python = environment / "bin" / "python"
    site = Path(
        run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).stdout.strip()
    )
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    install = ("install", "--quiet", "--no-deps", "--no-index", "--ignore-installed", str(built.wheel))
    run(sys.executable, "-m", "pip", "--python", python, *install, cwd=tmp_path)
    empty = tmp_path / "empty"
    empty.mkdir()
    check_installed(python, empty)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_pip_install_into_an_empty_environment(built: Built, tmp_path: Path) -> None:
    """What `pip install .` does on a fresh machine, with every dependency resolved and downloaded."""
    environment = tmp_path / "venv"
    run(sys.executable, "-m", "venv", environment, cwd=tmp_path)
    python = environment / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", str(built.source), cwd=tmp_path, timeout=1500)
    run(python, "-m", "pip", "check", cwd=tmp_path)
    empty = tmp_path / "empty"
    empty.mkdir()
    check_installed(python, empty)
    run(
        python, "-c", "import dstune.rank.worker, deepspeed, transformers, datasets, peft, gguf", cwd=empty, timeout=300
    )


def imported_distributions() -> dict[frozenset[str], str]:
    """Third-party distributions that dstune imports anywhere, each with one module that does: all that have files of the
    same package, as mlflow and mlflow-tracing do, count as one."""
    owners = importlib.metadata.packages_distributions()
    found: dict[frozenset[str], str] = {}
    for path in (ROOT / "dstune").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
            else:
                continue
            for top in {name.split(".")[0] for name in names} - sys.stdlib_module_names - {"dstune"}:
                found[frozenset(map(normal, owners.get(top, [top])))] = str(path.relative_to(ROOT))
    return found


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def declared(requirements: list[str]) -> set[str]:
    return {normal(re.match(r"[\w.-]+", requirement)[0]) for requirement in requirements}  # type: ignore[index]


def test_the_dependencies_are_what_is_imported() -> None:
    imported = imported_distributions()
    required = declared(PROJECT["project"]["dependencies"])
    optional = declared([entry for group in PROJECT["project"]["optional-dependencies"].values() for entry in group])
    # A notebook's kernel has the one; the other is the module of llama-cpp-python, where that is not installed.
    given = {
        "ipython",
        "llama-cpp",
    }
    missing = {names: path for names, path in imported.items() if not names & (required | optional | given)}
    assert not missing, "imported, but not declared in pyproject.toml"
    # transformers reads GGUF files through it.
    assert required - frozenset().union(*imported) <= {"gguf"}, "declared in pyproject.toml, but imported nowhere"


def test_the_dependencies_are_ranges() -> None:
    extras = [entry for group in PROJECT["project"]["optional-dependencies"].values() for entry in group]
    for requirement in PROJECT["project"]["dependencies"] + extras:
        assert "==" not in requirement and "+" not in requirement, f"{requirement} pins a build"
        assert ">=" in requirement or requirement.startswith("dstune["), f"{requirement} has no lower bound"


def test_this_environment_is_within_the_declared_ranges() -> None:
    from packaging.requirements import Requirement

    for entry in PROJECT["project"]["dependencies"]:
        requirement = Requirement(entry)
        version = importlib.metadata.version(requirement.name)
        assert requirement.specifier.contains(version, prereleases=True), f"{entry}: {version} is installed"
