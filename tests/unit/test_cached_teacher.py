"""An entry of a teacher's hidden states while it is made."""

from __future__ import annotations

from dstune.tasks.distillation.cached_teacher import _unfinished_entry


def test_runs_that_make_an_entry_at_once_do_not_meet(tmp_path):
    killed = tmp_path / "key.0123.unfinished"
    killed.mkdir()
    killed.with_name(f"{killed.name}.lock").touch()
    with _unfinished_entry(tmp_path, "key") as first:
        assert not killed.exists(), "what a killed process left is gone"
        (first / "train.npy").write_text("x")
        with _unfinished_entry(tmp_path, "key") as second:
            assert second != first and (first / "train.npy").is_file()
        assert not second.exists() and (first / "train.npy").is_file()
    assert not list(tmp_path.iterdir())
