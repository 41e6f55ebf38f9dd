"""The folder of optimizer states on a disk, and what a node may lack for it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dstune.config.schema import OptimizerOffload, ZeroConfig
from dstune.core.errors import UserError
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
        with swap.own_folder(on_disk(place), tmp_path / "other", Alone()) as other:
            assert other.nvme_path != zero.nvme_path
            assert own.is_dir(), "another run removes nothing of one that goes on"
    assert not list(place.iterdir())


def test_what_killed_runs_have_left_goes_when_another_one_starts(tmp_path):
    left, foreign = tmp_path / f"dstune-{os.getuid()}-killed", tmp_path / "of-others"
    for folder in (left, foreign):
        folder.mkdir()
        (folder / "lock").touch()
    with swap.own_folder(on_disk(tmp_path), tmp_path / "run", Alone()):
        assert not left.exists()
        assert foreign.exists()


def test_states_in_memory_need_no_folder(tmp_path):
    zero = ZeroConfig(nvme_path=str(tmp_path / "nowhere"))
    with swap.own_folder(zero, tmp_path, Alone()) as same:
        assert same is zero


@pytest.mark.parametrize(("place", "reason"), [("nowhere", "no such folder"), ("/dev/shm", "keeps files in memory")])
def test_a_place_that_is_none_is_refused(place, reason, tmp_path):
    with (
        pytest.raises(UserError, match=reason) as caught,
        swap.own_folder(on_disk(tmp_path / place), tmp_path, Alone()),
    ):
        pass
    (problem,) = caught.value.problems
    assert problem.where == "zero.nvme_path"
    assert problem.fix


def test_what_a_compiler_says_is_reported_with_what_to_install(tmp_path, monkeypatch):
    def fails(self, verbose):
        raise RuntimeError("Error building extension\nfatal error: libaio.h: No such file")

    monkeypatch.undo()  # compiles after all
    monkeypatch.setattr("shutil.which", lambda tool: f"/usr/bin/{tool}")
    monkeypatch.setattr("deepspeed.ops.op_builder.AsyncIOBuilder.is_compatible", fails)
    with (
        pytest.raises(UserError, match=r"(?s)libaio\.h: No such file.*libaio-dev"),
        swap.own_folder(on_disk(tmp_path), tmp_path, Alone()),
    ):
        pass


def settings(place: Path) -> dict:
    offload = {"device": "nvme", "nvme_path": str(place)}
    return {"zero_optimization": {"offload_optimizer": offload, "sub_group_size": 100}}


def test_a_disk_without_room_is_refused(tmp_path):
    swap.check_disk_space(settings(tmp_path), [1000], 2, Alone())
    with pytest.raises(UserError, match=r"optimizer states need .* GiB on each node's disk"):
        swap.check_disk_space(settings(tmp_path), [10**15], 2, Alone())


def test_memory_that_may_not_be_locked_is_reported_before_a_buffer_is(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(swap.resource, "getrlimit", lambda which: (2**23, 2**23))
    # A part has 1,024 + 100 elements, of four times 4 bytes.
    swap.check_disk_space(settings(tmp_path), [2**10] * 100, 2, Alone())
    with pytest.raises(UserError, match=r"(?s)34 MiB of locked memory, but 8 are allowed.*ulimit -l"):
        swap.check_disk_space(settings(tmp_path), [2**21 + 2**17], 2, Alone())
    swap.check_disk_space(settings(tmp_path), [2**19], 2, Alone())
    with pytest.raises(UserError, match="10 MiB of locked memory"):
        swap.check_disk_space(settings(tmp_path), [2**19], 3, Alone())


def test_a_file_that_the_disk_cut_short_is_seen(tmp_path):
    states, gradient = tmp_path / "states", tmp_path / "gradient"
    states.write_bytes(bytes(range(256)) * 64)
    gradient.write_bytes(bytes(range(256)) * 32)
    parts = SimpleNamespace(
        numel=lambda: 4096,
        get_swap_paths=lambda: [str(states)],
        swapped_gradients={0: SimpleNamespace(path=str(gradient), length=2048)},
    )
    wrapper = SimpleNamespace(optimizer_swapper=SimpleNamespace(swap_params_info={0: parts}))
    assert swap.unwritten(wrapper) == 0
    os.truncate(states, 8192)
    assert swap.unwritten(wrapper) == 8192


def test_a_trained_tensor_without_a_gradient_is_named():
    model = torch.nn.ModuleDict({"used": torch.nn.Linear(2, 2), "unused": torch.nn.Linear(2, 2)})
    gradients = swap.FirstGradients(dict(model.named_parameters()))
    model["used"](torch.ones(1, 2)).sum().backward()
    with pytest.raises(UserError, match=r"unused\.bias and 1 more got no gradient"):
        gradients.refuse_missing(Alone())
    model["unused"](torch.ones(1, 2)).sum().backward()
    gradients.refuse_missing(Alone())


def test_a_disk_that_took_less_than_all_ends_the_run(monkeypatch):
    monkeypatch.setattr(swap, "unwritten", lambda wrapper: 2**21)
    with pytest.raises(UserError, match="2 MiB of the optimizer states could not be written"):
        swap.check_written(None, Alone())
