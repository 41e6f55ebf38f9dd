"""Exit code and culprit for every way in which ranks end."""

import pytest

from dstune.core.errors import Preempted, Problem, Stalled, TrainingFailed, UserError, WaitedInVain, from_json, to_json
from dstune.launch import attempt
from dstune.launch.verdict import Ended, exit_reason, judge

MISTAKE = UserError(Problem("data.train", "it is empty"))
FAILED = TrainingFailed("loss was not finite")
SAVED = Preempted("received SIGTERM: saved at step 8")


def ends(*codes, ending=()):
    """Ranks in the order of their ends; those in `ending` were being ended by the launcher."""
    return [Ended(rank, code, order, rank in ending) for order, (rank, code) in enumerate(codes)]


@pytest.mark.parametrize(
    ("ended", "errors", "stop", "code", "culprit"),
    [
        (ends((0, 0), (1, 0)), {}, None, 0, None),
        (ends((0, 75), (1, 75)), {0: SAVED}, "SIGTERM", 75, None),
        (ends((1, 0), (0, 75)), {}, None, 75, None),
        (ends((1, 1), (0, 1)), {}, None, 1, 1),
        # One was killed, the other noticed and was seen first.
        (ends((0, 1), (1, -9)), {}, None, 1, 1),
        # The launcher's own SIGTERM is no cause.
        (ends((1, 1), (0, -15), ending={0}), {}, None, 1, 1),
        # A report of a failure tells more than the exit of those who waited for that rank.
        (ends((1, 1), (0, 1), ending={0}), {0: FAILED}, None, 1, 0),
        (ends((1, 1), (0, 2), ending={0}), {0: MISTAKE, 1: FAILED}, None, 2, 0),
        (ends((1, 1), (0, -15), ending={0}), {0: MISTAKE}, None, 2, 0),
        # A failure while the others save is a failure.
        (ends((0, 75), (1, -11)), {0: SAVED}, "SIGTERM", 1, 1),
        # SIGTERM before the handlers were there.
        (ends((1, -15), (0, -9), ending={0}), {}, "SIGINT", 75, None),
        (ends((1, -15), (0, -9), ending={0}), {}, None, 1, 1),
    ],
)
def test_verdicts(ended, errors, stop, code, culprit):
    verdict = judge(ended, errors, stop, forced=False)
    assert verdict.exit_code == code
    assert (verdict.culprit and verdict.culprit.rank) == culprit


def test_reasons():
    assert judge(ends((0, 75)), {0: SAVED}, "SIGTERM", False).reason == str(SAVED)
    assert judge(ends((0, 1)), {0: FAILED}, None, False).reason == "loss was not finite"
    assert judge(ends((1, 1), (0, -15), ending={0}), {0: FAILED}, None, False).reason == "loss was not finite"
    assert judge(ends((0, 1)), {}, None, False).reason == "rank 0 ended with exit code 1"
    assert judge(ends((0, -15)), {}, "SIGHUP", False).reason == "received SIGHUP before training began"
    assert judge(ends((0, 75)), {0: SAVED}, "SIGTERM", True).exit_code == 1


def test_ways_to_end():
    assert exit_reason(3) == "ended with exit code 3"
    assert exit_reason(-9).startswith("was killed by SIGKILL (by hand, or")
    assert exit_reason(-11).startswith("was killed by SIGSEGV")
    assert exit_reason(-10) == "was killed by SIGUSR1"
    assert exit_reason(-200) == "was killed by signal 200"


STALLED = Stalled("rank 1 made no progress for 3 s in step 8: it is in forward (loop.py:7)")
WAITED = WaitedInVain("rank 0 made no progress for 3 s in step 8: it waits for other ranks")


def test_a_rank_that_waited_in_vain_is_not_the_one_to_blame():
    both = ends((0, 1), (1, 1))
    assert judge(both, {0: WAITED, 1: STALLED}, None, False).reason == str(STALLED)
    assert judge(both, {0: WAITED}, None, False).reason == str(WAITED)
    verdict = judge(ends((0, 1), (1, -9), ending={1}), {0: WAITED}, None, False, stopped={1})
    assert verdict.culprit.rank == 1
    assert verdict.reason == f"rank 1 was stopped (SIGSTOP, or a debugger); {WAITED}"
    assert isinstance(verdict.error, Stalled), "the log of a rank that was woken to be ended explains nothing"


GLOO = "RuntimeError: [/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [::1]:2200"


def test_a_rank_that_lost_its_peer_is_not_the_one_to_blame():
    logs = {0: ["Traceback", f"[rank0]: {GLOO}"], 1: ["Traceback", "ValueError: bad row"], 2: [GLOO]}
    first_to_end = ends((0, 1), (2, 1), (1, 1), ending={1})
    disconnected = attempt.disconnected(first_to_end, logs.__getitem__)
    assert disconnected == {0, 2}
    assert judge(first_to_end, {}, None, False, disconnected=disconnected).culprit.rank == 1
    # If every rank lost a connection, then the network did: the first one is named.
    assert judge(first_to_end, {}, None, False, disconnected={0, 1, 2}).culprit.rank == 0
    killed = ends((0, 1), (1, -9), (2, 1))
    assert judge(killed, {}, None, False, disconnected={0, 2}).culprit.rank == 1


def test_kinds_of_failures_survive_the_way_to_the_launcher():
    for error in (STALLED, WAITED, FAILED, SAVED):
        assert type(from_json(to_json(error))) is type(error)
