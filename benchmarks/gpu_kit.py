"""Everything that `gpu_report.py` needs on a machine without a network: wheels in a folder, and the command lines to type there.

    make gpu-kit                                   for the image that benchmarks/gpu_image.txt describes
    make gpu-kit PRESENT=freeze.txt PYTHON_TARGET=3.13        for a machine whose `python3 -m pip freeze` is in freeze.txt

The wheels are those that dstune, TRL and Liger need and that the machine lacks. pip resolves them for its Python; what is
published as source alone is built here. Copy the checkout with `build/gpu-kit/` to the machine and run the printed lines in it.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import math
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
IMAGE = Path(__file__).with_name("gpu_image.txt")
PLATFORM = "x86_64-manylinux_2_39"
TAGS = [*(f"manylinux_2_{minor}_x86_64" for minor in range(39, 4, -1)), "manylinux2014_x86_64", "manylinux1_x86_64"]
"""Of every glibc up to 2.39: pip takes them literally."""

FROM_SOURCE = ("deepspeed", "antlr4-python3-runtime==4.9.*", "seqeval")
"""Published without wheels. DeepSpeed is built without its compiled operators, which no case of the report uses."""
BESIDE = ("trl>=1.0", "liger-kernel>=0.6")
"""What figures are compared with."""
NOT_USED = ("wandb",)
"""Dependencies of dstune that no case imports: 25 MB."""
OF_PART = {3: ("bitsandbytes>=0.46.1",)}
"""What a single part needs, so that the others need not carry it."""
LARGE = ("numpy", "pandas", "pyarrow", "scikit-learn", "scipy", "pillow")
"""Packages of 5 to 55 MB. If the machine has one in a version that is not known, it is taken to be new enough."""
LIMIT_MIB = 50
COMMAND_CHARACTERS = 2_000


def requirements() -> list[Requirement]:
    """Return what `pyproject.toml` requires and the report uses."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    needed = [Requirement(text) for text in (*project["dependencies"], *BESIDE)]
    return [requirement for requirement in needed if canonicalize_name(requirement.name) not in NOT_USED]


def read_present(lines: Iterable[str]) -> dict[str, str | None]:
    """Return the version of each installed package of a `pip freeze`, by its canonical name; None if only the name is known."""
    present: dict[str, str | None] = {}
    for line in lines:
        if match := re.match(r"([A-Za-z0-9][\w.-]*?)\s*(?:==\s*([^\s;+]+)\S*|@.*)?\s*$", line):
            present[canonicalize_name(match[1])] = match[2]
    return present


def missing_here() -> list[str]:
    """Return what this interpreter lacks of the requirements, or has in a version that they do not take."""
    problems = []
    for requirement in requirements():
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            problems.append(f"{requirement.name} is not installed")
        else:
            if not requirement.specifier.contains(version, prereleases=True):
                problems.append(f"{requirement.name} {version} is not {requirement.specifier}")
    return problems


def outdated(present: dict[str, str | None], needed: Sequence[Requirement]) -> set[str]:
    """Return the packages that are present in a version that dstune does not take."""
    versions = ((canonicalize_name(requirement.name), requirement.specifier) for requirement in needed)
    return {name for name, allowed in versions if (version := present.get(name)) and version not in allowed}


def is_enough(name: str, resolved: str, present: dict[str, str | None]) -> bool:
    """Return whether the machine needs no wheel of a package: it is there in the resolved version or a newer one, is large and
    there in a version that is not known, or comes with the machine's torch."""
    if "torch" in present and re.match("nvidia-|cuda-|triton", name):
        return True
    if name not in present:
        return False
    version = present[name]
    return Version(version) >= Version(resolved) if version else name in LARGE


def build_from_source(folder: Path, needed: Sequence[Requirement], names: Sequence[str] = FROM_SOURCE) -> None:
    """Build wheels of packages that are published as source alone. They contain no compiled part, so they fit any Python."""
    ranges = {canonicalize_name(requirement.name): str(requirement) for requirement in needed}
    words = [ranges.get(canonicalize_name(Requirement(name).name), name) for name in names]
    run("pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), *words)
    for wheel in folder.glob("*.whl"):
        assert wheel.name.endswith("-none-any.whl"), f"{wheel.name} was compiled for this machine"


def target_options(python: str) -> list[str]:
    platforms = [word for platform in TAGS for word in ("--platform", platform)]
    return ["--python-version", python, "--implementation", "cp", "--only-binary=:all:", *platforms]


def resolve(words: Sequence[str], python: str, present: dict[str, str | None], built: Path) -> dict[str, str]:
    """Return the version of every package that `words` need on the target, by name. What dstune imports itself stays in the version
    that is present there. Packages below are not pinned: a distribution's PyTorch runs with another sympy than its metadata names.
    uv reads metadata alone; pip's resolver tries the versions of torch's CUDA packages for minutes."""
    direct = {canonicalize_name(requirement.name) for requirement in requirements()}
    pins = [f"{package}=={version}" for package, version in present.items() if version and package in direct]
    (built / "constraints.txt").write_text("\n".join(pins))
    lines = run(
        *("uv", "pip", "compile", "-", "--no-header", "--no-annotate", "--no-config", "--only-binary", ":all:"),
        *("--python-version", python, "--python-platform", PLATFORM, "--find-links", str(built)),
        *("--constraint", str(built / "constraints.txt")),
        text="\n".join(words),
    )
    return {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in lines.split())}


def download(packages: dict[str, str], python: str, built: Path, folder: Path) -> None:
    """Put a wheel of each package into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    if packages:
        pinned = [f"{name}=={version}" for name, version in packages.items()]
        run(
            *("pip", "download", "--no-deps", "--find-links", str(built), "--dest", str(folder)),
            *(*target_options(python), *pinned),
        )


def drop_other_accelerators(wheel: Path, present: Iterable[str]) -> None:
    """Leave out of a wheel the libraries for other CUDA versions than the machine's torch: 5 of bitsandbytes' 43 MB remain."""
    majors = {match[1] for name in present if (match := re.fullmatch(r"nvidia-\w+-cu(\d\d)", name))}
    if len(majors) != 1:
        return
    shorter = wheel.with_suffix(".shorter")
    with zipfile.ZipFile(wheel) as source, zipfile.ZipFile(shorter, "w", zipfile.ZIP_DEFLATED) as target:
        for entry in source.infolist():
            library = re.search(r"_(cuda|rocm|xpu)(\d+)\.so$", entry.filename)
            if library is None or (library[1] == "cuda" and library[2].startswith(min(majors))):
                target.writestr(entry, source.read(entry))
    shorter.replace(wheel)


def run(*words: str, text: str = "") -> str:
    """Run a module of this interpreter; its output. Raises SystemExit with its error."""
    done = subprocess.run([sys.executable, "-m", *words, "--quiet"], input=text, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"gpu-kit: {' '.join(words[:3])} failed:\n{done.stderr.strip()[-3000:]}")
    return done.stdout


def fill(folder: Path, python: str, present: dict[str, str | None]) -> dict[int, list[Path]]:
    """Fill `folder` with wheels for the target, in place of what it held. Returns the folders that each part installs."""
    if folder.exists():
        shutil.rmtree(folder)
    common, needed = folder / "wheels", requirements()
    usable = {name: version for name, version in present.items() if name not in outdated(present, needed)}
    with tempfile.TemporaryDirectory() as name:
        built = Path(name)
        build_from_source(built, needed)
        versions = resolve([str(requirement) for requirement in needed], python, usable, built)
        download({n: v for n, v in versions.items() if not is_enough(n, v, usable)}, python, built, common)
        folders = {part: [common] for part in (1, 2, 3)}
        for part, words in OF_PART.items():
            wanted = {canonicalize_name(Requirement(word).name) for word in words} - set(usable)
            version_by_name = resolve(list(words), python, usable, built) if wanted else {}
            own_folder = folder / f"part-{part}"
            download(
                {name: version for name, version in version_by_name.items() if name in wanted},
                python,
                built,
                own_folder,
            )
            if wanted:
                folders[part].append(own_folder)
            for wheel in own_folder.glob("*.whl"):
                drop_other_accelerators(wheel, present)
    return folders


def command(part: int, folders: Sequence[Path], python: str = "python3", flags: str = "") -> str:
    """Return the line that installs the kit into a folder of its own and runs one part of the report, from the checkout's root."""
    wheels = " ".join(f"{folder}/*.whl" for folder in folders)
    site = f"${{TMPDIR:-/tmp}}/dstune-kit-{part}"
    install = f"{python} -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target {site} {wheels}"
    output = f'"${{OUT:-.}}/gpu-part-{part}.tar.gz"'
    return f"{install} && PYTHONPATH={site} {python} benchmarks/gpu_report.py {part} --output {output}{flags}"


def mib(folders: Iterable[Path]) -> float:
    return sum(file.stat().st_size for folder in folders for file in folder.glob("*.whl")) / 2**20


def size_warning(largest: float) -> str:
    """Return a warning if the wheels of a part, `largest` MiB, are more than the kit aims at; otherwise an empty text."""
    if largest <= LIMIT_MIB:
        return ""
    size = math.ceil(largest * 10) / 10  # rounded up, so that it is visibly above the limit
    return (
        f"warning: {size:.1f} MiB is more than the {LIMIT_MIB} MiB that the kit aims at; --present lists what is there"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("build/gpu-kit"))
    parser.add_argument("--python", default="3.12", help="version of the machine's Python")
    parser.add_argument(
        "--present", type=Path, default=IMAGE, help="`pip freeze` of the machine; a name alone is any version"
    )
    options = parser.parse_args()
    folders = fill(options.folder, options.python, read_present(options.present.read_text().splitlines()))
    for part, wheels in folders.items():
        print(f"part {part}, {mib(wheels):.1f} MiB of wheels:\n{command(part, wheels)}\n")
    if warning := size_warning(max(map(mib, folders.values()))):
        print(warning)
    return 0


if __name__ == "__main__":
    sys.exit(main())
