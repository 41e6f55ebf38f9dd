"""What a stranger's file may reach, and what others may see: data sets that lead elsewhere, passwords, hosts, modes."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest

from dstune.config.compose import compose
from dstune.config.validate import validate
from dstune.core import paths
from dstune.core.errors import UserError
from dstune.data import cache, sources
from dstune.lakehouse.address import parse
from dstune.lakehouse.inside import refuse_outside
from dstune.lakehouse.tables import check_files
from dstune.launch import host_slots, rundir
from dstune.launch.hosts import Ssh


@pytest.mark.parametrize("name", ["../secret.arrow", "/etc/passwd", "a/../../secret.arrow", "", ".", 3, None])
def test_a_saved_data_set_reads_no_file_outside_its_folder(name: object, tmp_path: Path) -> None:
    (tmp_path / "secret.arrow").write_bytes(b"x")
    folder = tmp_path / "rows"
    folder.mkdir()
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name}]}))
    (folder / "dataset_info.json").write_text("{}")
    with pytest.raises(UserError, match="outside of it"):
        sources.expand(str(folder), "data.train")


def test_a_split_is_a_name(tmp_path: Path) -> None:
    (tmp_path / "dataset_dict.json").write_text(json.dumps({"splits": ["..", "train"]}))
    with pytest.raises(UserError, match="no names of splits"):
        sources.expand(f"{tmp_path}:..", "data.train")


@pytest.mark.parametrize(
    "override",
    [
        "tracking.mlflow.uri=https://me:geheim@tracking.example/x",
        "tracking.mlflow.uri=postgresql://:geheim@db/x",
        "model.path=hf_abcdefghijklmnopqrstuvwxyzABCDEFGHIJ",
        "tracking.notes=ghp_abcdefghijklmnopqrstuvwxyzABCDEFGHIJ",
        "model.config_overrides={api_key: geheim}",
    ],
)
def test_a_password_that_is_written_out_is_refused_and_not_repeated(override: str) -> None:
    with pytest.raises(UserError) as caught:
        validate(compose(["experiment=quickstart", override]).config)
    assert any("written out here" in problem.reason for problem in caught.value.problems)
    assert "geheim" not in str(caught.value)
    assert "abcdefghijklmn" not in str(caught.value)


def test_a_reference_to_a_password_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKING", "https://me:geheim@tracking.example/x")
    validate(compose(["experiment=quickstart", "tracking.mlflow.uri=${oc.env:TRACKING}", "tracking.tags=[a@b]"]).config)


@pytest.mark.parametrize(
    "host", ["-oProxyCommand=id", "--help", "a;id", "a[1-9]", "a,b", "$(id)", "a'b", "user@host", "a/b"]
)
def test_a_host_is_no_option_and_no_list(host: str, tmp_path: Path) -> None:
    file = tmp_path / "hostfile"
    file.write_text(f"node1 slots=1\n{host} slots=1\n")
    with pytest.raises(UserError, match="not a host name or address"):
        host_slots.read_hostfile(str(file))


def test_options_of_ssh_end_before_the_host() -> None:
    words = Ssh().command("node1", ["true"])
    assert words[words.index("--") + 1] == "node1"


@pytest.mark.parametrize(("mode", "expected"), [("private", 0o700), ("group", 0o750)])
def test_a_run_directory_can_be_closed_to_others(
    mode: str, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    composed = compose(["experiment=quickstart", f"run.dir={tmp_path / 'run'}", f"run.mode={mode}"])
    monkeypatch.setattr(rundir, "write_run", lambda *_: None)
    (tmp_path / "run").mkdir(mode=0o755)
    rundir.prepare(composed)
    assert stat.S_IMODE((tmp_path / "run").stat().st_mode) == expected


ADDRESSES = ("FILE://{}", "file:{}", " file://{}", "\tfile://{}", "..\\private.parquet", "{}?/../x", "http://[::1]/x")


@pytest.mark.parametrize("form", ["{}", "file://{}", "../private.parquet", "%2e%2e/private.parquet", *ADDRESSES])
def test_a_table_names_no_file_outside_its_folder_in_any_spelling(form: str, tmp_path: Path) -> None:
    """The library reads some of them as addresses; as paths they name files in the folder, which are there and as large."""
    table, private = tmp_path / "table", tmp_path / "private.parquet"
    (table / "_delta_log").mkdir(parents=True)
    private.write_bytes(b"12345")
    name, address = form.format(private), parse(f"delta://{table}", "data.train")
    decoy = Path(table, name)
    decoy.parent.mkdir(parents=True, exist_ok=True)
    decoy.write_bytes(b"12345")
    with pytest.raises(UserError, match="outside the table's folder"):
        check_files([{"path": name, "size_bytes": 5}], str(table), address, "data.train")
    for kind, vector in (("p", name), ("u", f"{name}/{'0' * 20}")):
        action = {"add": {"path": "a", "deletionVector": {"storageType": kind, "pathOrInlineDv": vector}}}
        (table / "_delta_log" / "0.json").write_text(json.dumps(action))
        with pytest.raises(UserError, match="outside the table's folder"):
            refuse_outside(table, address, "data.train")


def test_a_table_in_a_store_names_no_file_of_this_machine() -> None:
    place, address = "s3://bucket/table", parse("delta://s3://bucket/table", "data.train")
    for name in ("file:///home/me/private.parquet", "FILE:/x", "\tfile:///x", "a\\b"):
        with pytest.raises(UserError, match="outside the table's folder"):
            check_files([{"path": name, "size_bytes": 1}], place, address, "data.train")
    inside = [{"path": name, "size_bytes": 1} for name in ("a%20b/x.parquet", "d=1:2/x.parquet", "s3://bucket/x")]
    assert check_files(inside, place, address, "data.train") == 3


@pytest.mark.parametrize("variable", ["HOME", "XDG_CACHE_HOME"])
def test_the_cache_is_made_for_its_user_alone(variable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has copies of rows, of which the original may be private. One that DSTUNE_CACHE names may be a team's."""
    for name in ("DSTUNE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, str(tmp_path))
    before = os.umask(0o022)
    try:
        folder = cache.entry(paths.cache_root() / "data", "key", lambda folder: (folder / "rows").touch())
        shared = tmp_path / "shared"
        monkeypatch.setenv("DSTUNE_CACHE", str(shared))
        cache.entry(paths.cache_root() / "data", "key", lambda folder: None)
    finally:
        os.umask(before)
    root = folder.parents[1]
    assert root.is_relative_to(tmp_path) and stat.S_IMODE(root.stat().st_mode) == 0o700
    assert stat.S_IMODE(shared.stat().st_mode) == 0o755
