"""The folder of optimizer states on a disk, and what a node may lack for it."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest

from dstune.config.schema import OptimizerOffload, ZeroConfig
from dstune.errors import UserError
from dstune.zero import swap


@dataclass
class Alone:
    """A world of one rank."""

    local_rank = 0
    size = 1
    is_main = True
    env = SimpleNamespace(local_size=1)

    def gather(self, value):
        return [value]


def on_disk(place: Path) -> ZeroConfig:
    return ZeroConfig(offload_optimizer=OptimizerOffload.nvme, nvme_path=str(place))


@pytest.fixture(autouse=True)
def compiled(monkeypatch):
    monkeypatch.setattr(swap, "_compile", lambda tell: None)


def test_a_run_has_a_folder_of_its_own_that_goes_with_it(tmp_path):
    place = tmp_path / "disk"
    place.mkdir()
    with swap.own_folder(on_disk(place), tmp_path / "run", Alone()) as zero:
        own = Path(zero.nvme_path)
        assert own.parent == place
        assert own.is_dir()
        (own / "left").write_text("by a run that was killed")
        killed = shutil.copytree(own, tmp_path / "copy")
        with swap.own_folder(on_disk(place), tmp_path / "other", Alone()) as other:
            assert other.nvme_path != zero.nvme_path
    assert not list(place.iterdir())
    shutil.copytree(killed, own)
    with swap.own_folder(on_disk(place), tmp_path / "run", Alone()):
        assert not list(own.iterdir())


def test_states_in_memory_need_no_folder(tmp_path):
    zero = ZeroConfig(nvme_path=str(tmp_path / "nowhere"))
    with swap.own_folder(zero, tmp_path, Alone()) as same:
        assert same is zero


@pytest.mark.parametrize(("place", "reason"), [("nowhere", "no such folder"), ("/dev/shm", "lies in memory")])
def test_a_place_that_is_none_is_refused(place, reason, tmp_path):
    with (
        pytest.raises(UserError, match=reason) as caught,
        swap.own_folder(on_disk(tmp_path / place), tmp_path, Alone()),
    ):
        pass
    (problem,) = caught.value.problems
    assert problem.where == "zero.nvme_path"
    assert problem.fix


def test_what_a_compiler_says_is_told_with_what_to_install(tmp_path, monkeypatch):
    def fails(tell):
        raise RuntimeError("Error building extension\nfatal error: libaio.h: No such file")

    monkeypatch.setattr(swap, "_compile", fails)
    with (
        pytest.raises(UserError, match=r"(?s)libaio\.h: No such file.*libaio-dev"),
        swap.own_folder(on_disk(tmp_path), tmp_path, Alone()),
    ):
        pass


def test_a_disk_without_room_is_refused(tmp_path):
    settings = {"zero_optimization": {"offload_optimizer": {"device": "nvme", "nvme_path": str(tmp_path)}}}
    swap.check_room(settings, 1000, 2, Alone())
    with pytest.raises(UserError, match=r"optimizer states take .* GiB of a node's disk"):
        swap.check_room(settings, 10**15, 2, Alone())
