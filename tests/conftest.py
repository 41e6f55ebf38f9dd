"""What holds for every test."""

from __future__ import annotations

import logging
import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from absl.logging import PythonHandler

LONG_FIRST = ("distributed", "cluster", "parity", "packaging", "unit")
"""Folders by how long a file of theirs takes: workers that take whole files end together when the short ones come last."""

ONLY_IN_CI = (
    *("cluster", "packaging/test_distribution", "security/test_fuzz", "security/test_two_users"),
    *(
        f"distributed/test_{name}"
        for name in (
            *(
                "baseline",
                "catalogue_probe",
                "chain",
                "evaluate",
                "faults",
                "few_rows",
                "finetuning_jobs",
                "hub_data",
                "loading",
                "old_runs",
            ),
            *("secrets", "serve", "multi_task", "sources", "streaming", "sweep", "tracking"),
            *("utilization", "watch", "zero_file"),
        )
    ),
    *(
        f"parity/test_{name}"
        for name in (
            *(
                "compiled",
                "experts",
                "forgetting",
                "method_runs",
                "micro_batch",
                "offload",
                "preference",
                "reward_embedding",
            ),
            *("seq2seq", "spikes", "swap", "tensor", "ulysses", "unfreezing"),
        )
    ),
)
"""Files (or folders) that `make test` leaves to `make test-ci`: they start ranks for minutes, and each proves something about
one method, task or launcher. The ladder, accumulation, resuming, signals and supervision stay."""

# A shell that starts `make test` in the background has it ignore Ctrl-C, `nohup` a hangup, and every command under test would too.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

# Runs are signed with a key of the tests, not with that of whoever runs them.
os.environ["XDG_CONFIG_HOME"] = tempfile.mkdtemp(prefix="dstune-tests-")

# Hydra closes all handlers of logging, and that of absl (of rouge-score) closes its stream, unless it is sys.stderr: within a
# test of `capsys` that is another one, and pytest's own would be closed under all tests that follow.
PythonHandler.close = logging.StreamHandler.close


@pytest.fixture(autouse=True)
def _environment() -> Iterator[None]:
    """The verbs set variables for the ranks they start (HF_HUB_OFFLINE and others): no test is to inherit another's."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--ci-part", metavar="K/N", help="leave out the files of the ci tier that the other parts have")


@pytest.hookimpl(tryfirst=True)  # before `-m` selects by the marker that is added here
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if place(item).startswith(ONLY_IN_CI):
            item.add_marker("ci")
    if chosen := config.getoption("--ci-part"):
        part, parts = map(int, chosen.split("/"))
        files = sorted({place(item) for item in items if _long(item)})
        others = {file for number, file in enumerate(files) if number % parts != part % parts}
        items[:] = [item for item in items if not (_long(item) and place(item) in others)]
    order = {folder: number for number, folder in enumerate(LONG_FIRST)}
    items.sort(key=lambda item: order.get(place(item).split("/")[0], len(order)))


def _long(item: pytest.Item) -> bool:
    return item.get_closest_marker("ci") is not None and item.get_closest_marker("slow") is None


def place(item: pytest.Item) -> str:
    """`parity/test_ladder.py`"""
    return item.path.relative_to(Path(__file__).parent).as_posix()
