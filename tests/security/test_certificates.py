"""Certificates of strangers, in `tools/certificates.py` and in a folder of certificates that others write to."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dstune_verify import certificate

ROOT = Path(__file__).parents[2]
STACK = {
    "python": "3.12.3", "packages": {"torch": "2.13.0"}, "digest": "0123456789abcdef", "variables": {},
    "device": {"type": "cuda", "name": "NVIDIA H100", "driver": "580.159"},
}  # fmt: skip
CASE = {
    "case": "zero2",
    "status": "wrong",
    "detail": "",
    "errors": {"gradient": 0.5},
    "known": {"source": "DeepSpeed #1"},
}


@pytest.fixture(scope="module")
def tool() -> Any:
    spec = importlib.util.spec_from_file_location("certificates_tool", ROOT / "tools" / "certificates.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def made(**changes: Any) -> dict[str, Any]:
    content = {"format": 1, "ranks": 8, "stack": STACK, "cases": [CASE], "form": "full", "made": "2026-12-01T10:00:00Z"}
    return content | changes


def on(**device: Any) -> dict[str, Any]:
    return made(stack=STACK | {"device": {**STACK["device"], **device}})


def pipe(file: Path) -> None:
    os.mkfifo(file)


def device(file: Path) -> None:
    file.symlink_to("/dev/zero")


def sparse(file: Path) -> None:
    with file.open("wb") as stream:
        stream.truncate(2**40)


def deep(file: Path) -> None:
    file.write_text("[" * 200_000)


@pytest.mark.parametrize("make", [pipe, device, sparse, deep])
def test_what_never_ends_is_no_certificate(make: Callable[[Path], None], tool: Any, tmp_path: Path) -> None:
    """A start of a run reads the folder of certificates too, which may be a team's."""
    file = tmp_path / "certificates" / "theirs.json"
    file.parent.mkdir()
    make(file)
    certificate.store(file.parent, made())
    newest = certificate.newest(file.parent)
    assert newest is not None and newest["made"] == made()["made"]
    with pytest.raises(SystemExit, match="no certificate"):
        tool.add([file], tmp_path / "folder")


@pytest.mark.parametrize("kind", ["../../../outside/x", "/OUTSIDE/x", "a/b", "", "\u202e"])
def test_the_file_of_a_certificate_is_in_its_folder(kind: str, tool: Any, tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    file = tmp_path / "theirs.json"
    kind = kind.replace("/OUTSIDE", str(tmp_path / "outside"))
    for name in ("---", "\u4e2d\u6587"):
        file.write_text(json.dumps(on(type=kind, name=name)))
        with pytest.raises(SystemExit, match=r"stack\.device"):
            tool.add([file], tmp_path / "a" / "b" / "folder")
    assert list((tmp_path / "outside").iterdir()) == []
    file.write_text(json.dumps(on(name="\u4e2d\u6587 ../..")))
    (target,) = tool.add([file], tmp_path / "folder")
    assert target == tmp_path / "folder" / "cuda-0123456789abcdef-full.json"


@pytest.mark.parametrize(
    "content",
    [
        on(name="\u202e|x|"), on(name="\x1b[2J"), on(name="\ud800"), on(driver="\u2066"), on(type=None), on(name=None), on(name=""),
        made(stack=STACK | {"device": {"name": "no type"}}), made(cases=[CASE | {"known": {"source": "\u202e"}}]),
        made(ranks=True), made(made="9999"), made(made="9999-12-31T00:00:00Z"),
    ],
)  # fmt: skip
def test_nothing_in_a_certificate_breaks_or_turns_the_page(content: dict[str, Any], tool: Any, tmp_path: Path) -> None:
    """Whatever is added is on the page, which is written for all certificates together; and a later one takes its place."""
    file = tmp_path / "theirs.json"
    file.write_text(json.dumps(content))
    with pytest.raises(SystemExit, match=r"stack\.device|known of|ranks|made"):
        tool.add([file], tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def test_text_of_a_certificate_is_no_markup(tool: Any, tmp_path: Path) -> None:
    text = "<script>alert(1)</script> ![x](http://stranger.invalid) {{ 1 }} | a"
    file = tmp_path / "theirs.json"
    file.write_text(
        json.dumps(on(name=text, driver=text) | {"cases": [CASE | {"known": {"source": text}, "errors": {}}]})
    )
    (target,) = tool.add([file], tmp_path / "folder")
    page = tool.page([tool.read(target)])
    shown = page[len(tool.HEAD) :]
    assert shown.count("alert(1)") == 3
    assert "<" not in shown and "![" not in shown and "{{" not in shown and " | a" not in shown
