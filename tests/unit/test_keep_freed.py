"""What glibc is told to keep, and what it is not told."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace

import pytest

from dstune.trainer import memory


@pytest.fixture
def mallopt_calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    calls: list[tuple[int, int]] = []
    libc = SimpleNamespace(mallopt=lambda option, value: calls.append((option, value)), malloc_trim=lambda pad: 1)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: libc)
    monkeypatch.setattr(memory.accelerator, "present", lambda: False)
    for name in ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES"):
        monkeypatch.delenv(name, raising=False)
    return calls


def test_freed_tensors_up_to_32_mib_are_kept(mallopt_calls: list[tuple[int, int]]) -> None:
    memory.keep_freed()
    assert mallopt_calls == [(-1, 2**31 - 1), (-3, 32 * 2**20)]  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h


@pytest.mark.parametrize(
    ("name", "value"), [("MALLOC_MMAP_THRESHOLD_", "65536"), ("GLIBC_TUNABLES", "glibc.malloc.mmap_threshold=65536")]
)
def test_what_the_user_has_set_stays(
    mallopt_calls: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    memory.keep_freed()
    assert [option for option, _ in mallopt_calls] == [-1]


def test_on_a_gpu_nothing_is_changed(mallopt_calls: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory.accelerator, "present", lambda: True)
    memory.keep_freed()
    assert mallopt_calls == []


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace())
    memory.keep_freed()
