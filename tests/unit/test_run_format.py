"""`run.yaml` and `state.json` say their format: earlier ones are read, later ones are refused."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from dstune.checkpoint import store
from dstune.cli import main
from dstune.config.data_schema import Padding
from dstune.config.resume import continue_run
from dstune.config.run_file import RUN_FORMAT, Composed, read_run, write_run
from dstune.config.schema import Automatic, UnreachedParts
from dstune.core.errors import UserError
from dstune.launch.records import acquire_lock
from dstune.trainer.state import FORMAT
from tests.support.configs import run_config


def test_a_run_says_its_format_and_one_without_is_the_first(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    written = Composed(run_config(), ["trainer.seed=3"])
    write_run(file, written)
    content = yaml.safe_load(file.read_text())
    assert next(iter(content)) == "format" and content["format"] == RUN_FORMAT
    assert read_run(file) == written
    del content["format"]
    file.write_text(yaml.safe_dump(content))
    assert read_run(file) == of_the_first_format(written)


def of_the_first_format(composed: Composed) -> Composed:
    """As runs did before formats 4 and 5."""
    model = replace(composed.config.model, unreached_parts=UnreachedParts.trained)
    data = replace(composed.config.data, padding=Padding.tolerated)
    return replace(composed, config=replace(composed.config, model=model, data=data))


@pytest.mark.parametrize("earlier", [None, 4])
def test_a_run_of_an_earlier_format_is_padded_as_it_was(tmp_path: Path, earlier: int | None) -> None:
    file = tmp_path / "run.yaml"
    write_run(file, Composed(run_config(), []))
    content = yaml.safe_load(file.read_text())
    del content["format"], content["config"]["data"]["padding"]
    content |= {} if earlier is None else {"format": earlier}
    file.write_text(yaml.safe_dump(content))
    before = read_run(file)
    assert before.config.data.padding is Padding.tolerated
    # The command does not set it.
    assert continue_run(before, Composed(run_config(), [])).data.padding is Padding.tolerated


@pytest.mark.parametrize("earlier", [None, 2, 3])
def test_a_run_of_an_earlier_format_keeps_training_what_it_trained(tmp_path: Path, earlier: int | None) -> None:
    file = tmp_path / "run.yaml"
    write_run(file, Composed(run_config(), []))
    content = yaml.safe_load(file.read_text())
    del content["format"], content["config"]["model"]["unreached_parts"]
    content |= {} if earlier is None else {"format": earlier}
    file.write_text(yaml.safe_dump(content))
    assert read_run(file).config.model.unreached_parts is UnreachedParts.trained
    write_run(file, read_run(file))  # as `dstune upgrade` and a continued run do
    assert read_run(file).config.model.unreached_parts is UnreachedParts.trained


@pytest.mark.parametrize("earlier", [None, 2, 3])
def test_a_run_keeps_the_stall_seconds_that_were_the_default_when_it_began(tmp_path: Path, earlier: int | None) -> None:
    """They were a number once. The command that started the run says nothing of them when it is repeated."""
    file = tmp_path / "run.yaml"
    config = run_config()
    write_run(
        file, Composed(replace(config, trainer=replace(config.trainer, stall_seconds=1800.0)), ["trainer.seed=3"])
    )
    content = yaml.safe_load(file.read_text())
    content |= {} if earlier is None else {"format": earlier}
    file.write_text(yaml.safe_dump(content))
    assert run_config().trainer.stall_seconds is Automatic.auto
    assert read_run(file).config.trainer.stall_seconds == 1800.0
    repeated = Composed(run_config(), ["trainer.seed=3"])
    assert continue_run(read_run(file), repeated).trainer.stall_seconds == 1800.0
    other = Composed(run_config(), ["trainer.seed=3", "trainer.stall_seconds=auto"])
    assert continue_run(read_run(file), other).trainer.stall_seconds is Automatic.auto


@pytest.mark.parametrize("later", [RUN_FORMAT + 1, 0, "two", True])
def test_another_format_is_refused(tmp_path: Path, later: object) -> None:
    file = tmp_path / "run.yaml"
    write_run(file, Composed(run_config(), []))
    file.write_text(yaml.safe_dump({**yaml.safe_load(file.read_text()), "format": later}))
    with pytest.raises(UserError) as caught:
        read_run(file)
    [problem] = caught.value.problems
    assert (problem.where, problem.value) == (f"{file}: format", str(later))


STATE_OF_FORMAT_1 = {"train": {"step": 2, "skipped_windows": 1, "timed_tokens": 7}, "best": None}


def run_of_format_1(run_dir: Path) -> Path:
    """A run directory with a checkpoint, as the first format has them; returns the checkpoint."""
    written = store.folder(run_dir) / f"{store.tag(2)}{store.INCOMPLETE}"
    (written / "zero").mkdir(parents=True)
    (written / "weights.pt").write_bytes(b"weights")
    (written / "zero" / "rank-0.pt").write_bytes(b"moments")
    checkpoint = store.commit(written, STATE_OF_FORMAT_1)
    write_run(run_dir / "run.yaml", Composed(run_config(), ["trainer.seed=3"]))
    content = yaml.safe_load((run_dir / "run.yaml").read_text())
    del content["format"]
    (run_dir / "run.yaml").write_text(yaml.safe_dump(content))
    return checkpoint


def content(run_dir: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(run_dir.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("links", [True, False])
def test_upgrade_rewrites_what_is_of_an_earlier_format(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], links: bool
) -> None:
    checkpoint = run_of_format_1(tmp_path)
    shard, state, run = checkpoint / "zero" / "rank-0.pt", store.read_state(checkpoint), read_run(tmp_path / "run.yaml")
    before = shard.stat().st_ino
    if not links:

        def refuse(*_: object) -> None:
            raise PermissionError(1, "Operation not permitted")

        monkeypatch.setattr(os, "link", refuse)
    assert main(["upgrade", str(tmp_path)]) == 0
    printed = f"checkpoints/{checkpoint.name}/state.json: format 1 -> {FORMAT}\nrun.yaml: format 1 -> {RUN_FORMAT}\n"
    assert capsys.readouterr().out == printed
    assert json.loads((checkpoint / "state.json").read_text()) == state and state["format"] == FORMAT
    assert read_run(tmp_path / "run.yaml") == run
    assert yaml.safe_load((tmp_path / "run.yaml").read_text())["format"] == RUN_FORMAT
    assert store.is_committed(checkpoint) and store.damaged_files(checkpoint) == []
    assert (shard.stat().st_ino == before) is links
    assert [path.name for path in store.folder(tmp_path).iterdir()] == [checkpoint.name]

    after = content(tmp_path)
    assert main(["upgrade", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"run": str(tmp_path), "upgraded": []}
    assert content(tmp_path) == after


def test_a_crash_before_the_new_state_counts_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = run_of_format_1(tmp_path)

    def crash(*_: object) -> Path:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(store, "commit", crash)
        with pytest.raises(KeyboardInterrupt):
            store.upgrade(checkpoint)
    assert json.loads((checkpoint / "state.json").read_text()) == STATE_OF_FORMAT_1
    assert store.newest(tmp_path) == checkpoint and store.damaged_files(checkpoint) == []
    assert store.upgrade(checkpoint) == 1  # over what the crash left
    assert store.upgrade(checkpoint) is None


def test_nothing_is_upgraded_where_something_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = run_of_format_1(tmp_path)
    file = tmp_path / "run.yaml"
    file.write_text(f"format: {RUN_FORMAT + 1}\n{file.read_text()}")
    assert main(["upgrade", str(tmp_path)]) == 2
    assert f"{file}: format" in capsys.readouterr().err
    assert json.loads((checkpoint / "state.json").read_text()) == STATE_OF_FORMAT_1


def test_a_run_in_use_is_not_upgraded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_of_format_1(tmp_path)
    lock = acquire_lock(tmp_path)
    try:
        assert main(["upgrade", str(tmp_path)]) == 2
    finally:
        os.close(lock)
    assert "run.dir" in capsys.readouterr().err
