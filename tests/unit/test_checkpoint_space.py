"""Room for two checkpoints is an estimate: refused, unless `run.force` says to start all the same."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from support.configs import run_config

from dstune.checkpoint.session import Checkpoints
from dstune.config.schema import RunSection
from dstune.core.errors import UserError


def check(folder, size: int, *, force: bool) -> list[str]:
    messages: list[str] = []
    engine, world = SimpleNamespace(checkpoint_bytes=lambda: size), SimpleNamespace(broadcast=lambda value: value)
    Checkpoints(run_config(run=RunSection(force=force)), folder, engine, world, {}, messages.append).check_space()
    return messages


def test_no_room_is_refused_and_the_fix_works(tmp_path):
    with pytest.raises(UserError, match=r"there must be room for two\n    fix: .*run\.force=true"):
        check(tmp_path, 10**18, force=False)
    [message] = check(tmp_path, 10**18, force=True)
    assert "started all the same (run.force)" in message


@pytest.mark.parametrize("force", [False, True])
def test_room_is_reported(tmp_path, force):
    [message] = check(tmp_path, 1, force=force)
    assert "are free" in message and "force" not in message
