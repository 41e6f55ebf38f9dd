"""What holds for every test."""

from __future__ import annotations

import gc
import logging
import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from absl.logging import PythonHandler
from support import warm_start
from support.tiers import SECONDS, WHOLE_FILES, is_left_to_slow, part_of

pytest.register_assert_rewrite("support.matrix")

LONG_FIRST = (
    "distributed",
    "parity",
    "cluster",
    "packaging",
    "finetuning",
    "serve",
    "guard",
    "lakehouse",
    "monitor",
    "unit",
)
"""Folders by how long a file of theirs takes, where `support.tiers` does not know it: workers that take whole files end together
when the short ones come last."""

# A shell that starts `make test` in the background has it ignore Ctrl-C, `nohup` a hangup, and every command under test would too.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

# Runs are signed with a key of the tests, not with that of whoever runs them.
os.environ["XDG_CONFIG_HOME"] = tempfile.mkdtemp(prefix="dstune-tests-")

# Hydra closes all handlers of logging, and that of absl (of rouge-score) closes its stream, unless it is sys.stderr: within a
# test of `capsys` that is another one, and pytest's own would be closed under all tests that follow.
PythonHandler.close = logging.StreamHandler.close


def _environment() -> Iterator[None]:
    """The verbs set variables for the ranks they start (HF_HUB_OFFLINE and others), and fixtures of a file for its tests: no
    test is to inherit another's."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


_environment_of_a_file = pytest.fixture(autouse=True, scope="module")(_environment)
_environment_of_a_test = pytest.fixture(autouse=True)(_environment)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Commands of tests marked `cold`, and of the fixtures that are set up for them, import everything themselves."""
    if item.get_closest_marker("cold"):
        warm_start.cold.set()
    try:
        return (yield)
    finally:
        warm_start.cold.clear()


# What collection imports (torch, transformers, every test) stays: walked through by each collection of garbage, it made tests
# that compose configurations a fifth slower, and collecting tests itself 26 s instead of 33.
gc.disable()


def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()
    warm_start.between_tests.update(os.environ)
    gc.set_threshold(20_000, 20, 20)
    gc.enable()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--ci-part", metavar="K/N", help="leave out the files of the ci tier that the other parts have")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Files of the ci tier alone are not even imported where `-m` leaves it out."""
    return True if "not ci" in config.getoption("markexpr") and place(collection_path) in WHOLE_FILES else None


@pytest.hookimpl(tryfirst=True)  # before `-m` selects by the marker that is added here
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if place(item.path) in WHOLE_FILES:
            item.add_marker("ci")
        if is_left_to_slow(f"{place(item.path)}::{item.name}"):
            item.add_marker("slow")
    if chosen := config.getoption("--ci-part"):
        part, parts = map(int, chosen.split("/"))
        parts_of_files = part_of({place(item.path) for item in items if _long(item)}, parts)
        items[:] = [item for item in items if not _long(item) or parts_of_files[place(item.path)] == part]
    folders = {folder: number for number, folder in enumerate(LONG_FIRST)}
    items.sort(
        key=lambda item: (-SECONDS.get(place(item.path), 0), folders.get(place(item.path).split("/")[0], len(folders)))
    )


def _long(item: pytest.Item) -> bool:
    return item.get_closest_marker("ci") is not None and item.get_closest_marker("slow") is None


def place(file: Path) -> str:
    """`parity/test_ladder.py`"""
    return file.relative_to(Path(__file__).parent).as_posix()
