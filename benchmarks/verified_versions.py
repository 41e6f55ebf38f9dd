#!/usr/bin/env python3
"""Every release of DeepSpeed since 0.17, judged by `dstune-verify`: which known faults it has.

python benchmarks/verified_versions.py run [--releases 0.18.2,0.19.8] [--work FOLDER]
python benchmarks/verified_versions.py write      # docs/verified-versions.md from benchmarks/verified_versions.json

Each release is installed without its dependencies into a folder before this environment's packages, so that one thing differs.
`run` goes on after the last release that is in the JSON file.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
TABLE, PAGE = ROOT / "benchmarks" / "verified_versions.json", ROOT / "docs" / "verified-versions.md"
RELEASES = [
    *(f"0.17.{patch}" for patch in range(7)),
    *(f"0.18.{patch}" for patch in range(10)),
    *(f"0.19.{patch}" for patch in range(9)),
]
LIMIT = 600
"""Seconds for the short form on one release; it takes 10 on an idle machine."""

FAULTS = {
    "zero2-fp32-accumulation": ("A", "ZeRO-2 with gradient accumulation", "#7718"),
    "zero2-fp32-accumulation-offload": ("B", "ZeRO-2 with accumulation and the optimizer on the host", "#7967"),
    "zero0-bf16": ("C", "bf16 without ZeRO", "#7839"),
    "zero1-bf16-accumulation-in-fp32": ("D", "ZeRO-1 in bf16 with `grad_accum_dtype: fp32`", "#7985"),
    "zero2-bf16-clipping-left-out": ("E", "no `gradient_clipping` in the file: clipped at 1.0", "#8068"),
    "zero2-bf16-scattered-gradients": ("F", "ZeRO-2 with `contiguous_gradients: false` and accumulation", ""),
    "zero3-bf16-lora-recomputed": ("G", "ZeRO-3 with LoRA and non-reentrant recomputation", "#8148"),
    "zero3-fp32-repeated-reentrant": ("H", "ZeRO-3, a module that is called twice, reentrant recomputation", ""),
    "zero2-fp32-uneven-experts": ("I", "ZeRO-2, ranks whose rows reach different experts", ""),
}
"""Letter of the column, what the case trains, and the issue or pull request of DeepSpeed, by case."""


def install(release: str, work: Path) -> Path:
    """Return a folder with a release of DeepSpeed and nothing else."""
    folder = work / f"deepspeed-{release}"
    if not (folder / "deepspeed").is_dir():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
        subprocess.run(
            [*command, "--target", str(folder), f"deepspeed=={release}"],
            check=True,
            env={**os.environ, "DS_BUILD_OPS": "0"},
        )
    return folder


def verify(folder: Path) -> list[dict[str, Any]]:
    """Run the short form with the packages of `folder` first and return its cases."""
    done = subprocess.run(
        [sys.executable, "-m", "dstune_verify", "--short", "--json", "--ranks", "2"],
        env={**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        timeout=LIMIT,
        check=False,
    )
    return [case for case in json.loads(done.stdout)["cases"] if case["case"] in FAULTS]


def run(releases: list[str], work: Path) -> None:
    for release in releases:
        table = json.loads(TABLE.read_text()) if TABLE.exists() else {"releases": {}}
        if release in table["releases"]:
            continue
        cases = verify(install(release, work))
        table["releases"][release] = {
            case["case"]: {
                "status": case["status"],
                "error": float(f"{case['errors'].get('gradient', 0.0):.2g}"),
                "detail": case["detail"].splitlines()[0][:160] if case["detail"] else "",
            }
            for case in cases
        }
        table["environment"] = {
            "python": platform.python_version(),
            "torch": version("torch"),
            "device": "CPU, gloo, 2 ranks",
        }
        TABLE.write_text(json.dumps(table, indent=1) + "\n")
        print(release, " ".join(cell(table["releases"][release].get(case)) for case in FAULTS), flush=True)


def cell(outcome: dict[str, Any] | None) -> str:
    """Return what a table says about a case."""
    if outcome is None or outcome["status"] == "not run":
        return "not run"
    if outcome["status"] == "right":
        return "right"
    return f"**{outcome['error']:.2g}**" if outcome["status"] == "wrong" else "fails"


def page() -> str:
    """Return the page of the JSON file."""
    table = json.loads(TABLE.read_text())
    releases, environment = table["releases"], table["environment"]
    upstream = {letter: f"DeepSpeed {issue}" if issue else "not reported" for letter, _, issue in FAULTS.values()}
    newest_first = sorted(releases, key=lambda text: [int(part) for part in text.split(".")], reverse=True)
    return PAGE_TEXT.format(
        cases="\n".join(f"| {letter} | {text} | {upstream[letter]} |" for letter, text, _ in FAULTS.values()),
        heading=" | ".join(upstream),
        line=" --- |" * len(upstream),
        rows="\n".join(
            f"| {release} | {' | '.join(cell(releases[release].get(case)) for case in FAULTS)} |"
            for release in newest_first
        ),
        **environment,
    )


PAGE_TEXT = """# Which DeepSpeed computes the right gradients

Each release of DeepSpeed since 0.17 trained nine tiny models for two steps with SGD. A bold number is the relative error of the
whole gradient, compared with a plain PyTorch loop: up to 0.02 would be rounding in bf16, 0.7 is another gradient. The loss of the
step shows none of these errors. *Fails* means that training ends with an error, so nobody trains wrong without noticing.

If your release is wrong in a case that resembles your training, take a release that is right there or avoid the setting.

| | case | upstream |
| --- | --- | --- |
{cases}

| DeepSpeed | {heading} |
| --- |{line}
{rows}

The environments differ in DeepSpeed alone: Python {python}, torch {torch}, {device}. What fails here (G up to
0.19.2, and A, B, E, F and I of 0.18.7 to 0.18.9) may work on an older torch. The error of H in 0.18.3 to 0.18.7, and that of G in
0.19.3, differ from run to run; 0.19.3 was right in another run. F was seen on CPUs only. What needs a GPU to show (streams, NCCL,
fused kernels) is not in this table.

To try your own environment, see [Is my stack right?](verify.md)

The table is made by `python benchmarks/verified_versions.py run`, the page by `python benchmarks/verified_versions.py write`.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=("run", "write"))
    parser.add_argument("--releases", type=lambda text: text.split(","), default=RELEASES)
    parser.add_argument("--work", type=Path)
    arguments = parser.parse_args()
    if arguments.verb == "write":
        PAGE.write_text(page())
    elif arguments.work:
        run(arguments.releases, arguments.work)
    else:
        with tempfile.TemporaryDirectory() as folder:
            run(arguments.releases, Path(folder))


if __name__ == "__main__":
    main()
