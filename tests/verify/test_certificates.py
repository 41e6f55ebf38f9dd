"""Certificates: written, read again, merged into a page, copied into runs."""

from __future__ import annotations

import getpass
import importlib.util
import json
from importlib.metadata import version
from pathlib import Path

import pytest

from dstune.rank import startup
from dstune_verify import certificate, command, environment
from dstune_verify.cases import CRASHED, Outcome
from dstune_verify.catalogue import all_cases
from dstune_verify.options import Options
from dstune_verify.verdict import Verdict

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("certificates_tool", ROOT / "tools" / "certificates.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def made(name="NVIDIA H100 80GB HBM3", form="full", date="2026-12-01T10:00:00Z", cases=(), **packages):
    stack = {
        "python": "3.12.3", "packages": {"torch": "2.13.0", "deepspeed": "0.19.8"} | packages, "digest": "0123456789abcdef",
        "device": {"type": "cuda", "name": name, "driver": "580.159"}, "variables": {},
    }  # fmt: skip
    outcomes = [
        {"case": case, "status": status, "detail": "", "errors": errors, "bounds": {}, "seconds": 1.0, "known": known}
        for case, status, errors, known in cases
    ]
    return {"format": 1, "ranks": 8, "stack": stack, "counts": {}, "cases": outcomes, "form": form, "made": date}


def test_a_run_writes_one_that_can_be_read_again(verify, tmp_path):
    file = tmp_path / "folder" / "certificate.json"
    done = verify("--cases", "packages", "--ranks", "1", "--certificate", str(file), "--json")
    assert done.code == 0
    assert certificate.read(file) == done.report
    assert (done.report["form"], done.report["cases"][0]["status"]) == ("chosen", "right")
    assert certificate.changes(done.report) == []


def test_nothing_private_is_in_it(monkeypatch):
    monkeypatch.setattr("socket.gethostname", lambda: "login-3.example.org")
    detail = (
        f"RuntimeError: [gpu-7.example.org]:29500 and (gpu-7, 29500) and 10.1.2.3:4567 and fe80::1:2 of {getpass.getuser()} on "
        "login-3: /home/alice/project/model.safetensors and C:\\Users\\bob\\a.txt are gone; shape (4, 128)"
    )
    case = all_cases(Options())["packages-of-ranks"]
    content = Verdict([Outcome(case.name, CRASHED, detail)], {case.name: case}, 2).as_json()
    assert content["cases"][0]["detail"] == (
        "RuntimeError: ADDRESS and ADDRESS and ADDRESS and ADDRESS of USER on HOST: PATH and PATH are gone; shape (4, 128)"
    )


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"made": "<script>"}, "made is no date"),
        ({"form": "half"}, "form is none of full, short, chosen"),
        ({"ranks": "8"}, "ranks or cases are missing"),
        (
            {"stack": {"device": {"type": "cpu"}, "digest": "a", "python": "3", "packages": {"torch": "| x |"}}},
            "stack.packages is no",
        ),
        ({"cases": [{"case": "a b", "status": "right"}]}, "a case has no name"),
        ({"cases": [{"case": "a", "status": "fine"}]}, "a case has no name, or another status"),
        ({"cases": [{"case": "a", "status": "wrong", "errors": {"gradient": "x"}}]}, "detail or errors of a"),
        ({"cases": [{"case": "a", "status": "wrong", "known": ["x"]}]}, "known of a is no object"),
    ],
)
def test_what_is_none_is_refused(tool, tmp_path, change, reason):
    file = tmp_path / "certificate.json"
    file.write_text(json.dumps(made() | change))
    assert certificate.read(file) is None
    with pytest.raises(SystemExit, match=reason):
        tool.add([file], tmp_path / "folder")


def test_the_page_has_devices_by_versions_by_cases(tool, tmp_path):
    known = {"name": "zero2-accumulation", "source": "DeepSpeed #7718"}
    wrong, right = ("zero2", "wrong", {"gradient": 0.7123}, known), ("zero2", "right", {"gradient": 1e-6}, None)
    certificates = [
        made(cases=[wrong, ("golden", "right", {}, None)], deepspeed="0.18.2"),
        made(cases=[right, ("golden", "crashed", {}, None)], date="2026-12-02T10:00:00Z"),
        made(name="AMD | *MI300X*", cases=[right], form="short"),
    ]
    for number, content in enumerate(certificates):
        content["stack"]["digest"] = f"{number}" * 16
        (tmp_path / f"{number}.json").write_text(json.dumps(content))
    files = tool.add([tmp_path / f"{number}.json" for number in range(3)], tmp_path / "folder")
    text = tool.page([tool.read(file) for file in sorted(files)])
    _, amd, nvidia = text.split("## ")
    assert amd.startswith("AMD \\| \\*MI300X\\*") and "All cases that ran are right." in amd
    assert "| 1 | 2026-12-02 | 8 | 3.12.3 | 2.13.0 | 0.19.8 | 580.159 | full | 1 | 0 | 1 | 0 |" in nvidia
    assert "| 2 | 2026-12-01 | 8 | 3.12.3 | 2.13.0 | 0.18.2 | 580.159 | full | 1 | 1 | 0 | 0 |" in nvidia
    assert "| `zero2` | right | **0.71** DeepSpeed #7718 |" in nvidia
    assert "| `golden` | fails | right |" in nvidia


def test_an_earlier_one_of_the_same_stack_does_not_replace_a_later_one(tool, tmp_path):
    for name, date in (("new", "2026-12-02T10:00:00Z"), ("old", "2026-12-01T10:00:00Z")):
        (tmp_path / f"{name}.json").write_text(json.dumps(made(date=date)))
    (target,) = tool.add([tmp_path / "new.json"], tmp_path / "folder")
    assert tool.add([tmp_path / "old.json"], tmp_path / "folder") == [target]
    assert tool.read(target)["made"] == "2026-12-02T10:00:00Z"


def test_the_page_is_that_of_the_folder(tool):
    assert tool.PAGE.read_text() == tool.page([tool.read(file) for file in sorted(tool.FOLDER.glob("*.json"))])


def test_the_folder_keeps_all_cases_and_the_short_ones(tmp_path):
    for form in ("full", "short", "chosen"):
        command.write_certificates(made(form=form), tmp_path / form / "certificate.json", tmp_path / "folder")
        assert (tmp_path / form / "certificate.json").is_file()
    names = sorted(file.name for file in (tmp_path / "folder").iterdir())
    assert names == ["0123456789abcdef-cuda-full.json", "0123456789abcdef-cuda-short.json"]


def test_a_run_keeps_the_newest_one_and_says_what_has_changed_since(tmp_path, monkeypatch):
    monkeypatch.setenv("DSTUNE_CACHE", str(tmp_path / "cache"))
    said: list[str] = []
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    startup.record_certificate(run_dir, said.append)
    assert (said, list(run_dir.iterdir())) == ([], [])
    now = {"stack": made()["stack"] | environment.versions(), "made": "2026-12-02T10:00:00Z"}
    folder = tmp_path / "cache" / "certificates"
    certificate.store(folder, made(torch="2.0.0"))
    certificate.store(folder, made(form="short") | now)
    (folder / "torn.json").write_text("{")
    startup.record_certificate(run_dir, said.append)
    assert (said, json.loads((run_dir / "certificate.json").read_text())) == ([], made(form="short") | now)
    now["stack"]["packages"] = now["stack"]["packages"] | {"deepspeed": "0.1.0"}
    certificate.store(folder, made(form="short") | now)
    startup.record_certificate(run_dir, said.append)
    assert len(said) == 1
    assert f"since `dstune verify` on 2026-12-02: deepspeed {version('deepspeed')} instead of 0.1.0 (" in said[0]
