"""A report of the GPU tests to paste: the machine, versions, and what each case measured."""

from __future__ import annotations

import importlib.metadata
import platform

import pytest


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reports = [
        report
        for outcome in ("passed", "failed")
        for report in terminalreporter.stats.get(outcome, [])
        if report.when == "call" and "tests/gpu/" in report.nodeid
    ]
    if not reports:
        return
    write = terminalreporter.write_line
    write("")
    write("### dstune GPU report (paste from here)")
    for line in machine():
        write(f"- {line}")
    write("")
    write("| case | outcome | seconds | measured |")
    write("| --- | --- | --- | --- |")
    for report in reports:
        name = report.nodeid.partition("::")[2]
        measured = ", ".join(f"{key} {value}" for key, value in report.user_properties)
        write(f"| {name} | {report.outcome} | {report.duration:.0f} | {measured} |")


def machine() -> list[str]:
    """What the numbers depend on, one line each."""
    import torch

    versions = ("dstune", "torch", "deepspeed", "transformers")
    gpus = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return [
        "GPUs: " + ", ".join(f"{gpu.name} ({gpu.total_memory / 2**30:.0f} GiB)" for gpu in gpus),
        f"CUDA {torch.version.cuda}, NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}" if gpus else "no CUDA",
        "Python " + platform.python_version() + ", " + ", ".join(f"{name} {version(name)}" for name in versions),
    ]


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
