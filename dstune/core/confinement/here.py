"""Runs untrusted work, such as chat templates and patterns, within limits of time and memory.

`limited` is for frequent work in this process: two timers of processor time, and a limit of memory. The first timer raises; the
second ends the process, for an operation inside the interpreter that does not check for signals.
`in_child` is for a single trial before the work is used here: it runs in a forked process that can be killed.
"""

from __future__ import annotations

import faulthandler
import os
import re
import resource
import select
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from typing import IO, Any, NoReturn

from dstune.core.confinement import inside
from dstune.core.confinement.table import PATTERNS, WALL, Limits
from dstune.core.errors import Problem, UserError

_MEASURED_EVERY = 100
"""Uses of `limited` between two measurements of the process's memory."""
_HARD = 5.0
"""Multiple of the time limit after which the process is ended."""


_AGAIN = 0.01
_AROUND = (__file__, contextmanager.__code__.co_filename)
"""Files with the code around the work, in which nothing is raised."""


class TooMuch(Exception):
    """Untrusted work exceeded its limit of time or memory; the text says which."""


class _State:
    """State of this process."""

    active = False
    uses = 0
    has_bytes = 0
    pid = 0
    """Of the process that `has_bytes` is of: a fork has less."""
    registered = False


@contextmanager
def limited(limits: Limits, ended_after: float | None = None) -> Iterator[None]:
    """Limit processor time and additional memory of this process within the block. Nested blocks do nothing.

    limits: `seconds` and `added_bytes`. Without `seconds`, memory is counted from what the process has now.
    ended_after: seconds after which the process is ended if it does not check for signals; by default five times `seconds`.

    Outside of the main thread, the only one that gets signals, only memory is limited.
    Raises TooMuch.
    """
    if _State.active:
        yield
        return
    timed = limits.seconds if threading.current_thread() is threading.main_thread() else 0.0
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    _State.active = True
    try:
        _limit_memory(soft, hard, limits.added_bytes, anew=not limits.seconds)
        if timed:
            if not _State.registered:
                _State.registered = True
                signal.signal(signal.SIGVTALRM, _raise)
                # Where the process is ended, its last words are what it was doing.
                faulthandler.register(signal.SIGPROF, file=sys.__stderr__ or 2, chain=True)
            signal.setitimer(signal.ITIMER_PROF, ended_after or timed * _HARD)
            signal.setitimer(signal.ITIMER_VIRTUAL, timed)
        try:
            yield
        finally:
            if timed:
                signal.setitimer(signal.ITIMER_VIRTUAL, 0)
                signal.setitimer(signal.ITIMER_PROF, 0)
    except MemoryError:
        raise TooMuch(f"takes more than {round(limits.added_bytes / 2**30, 1):g} GiB of memory") from None
    except _Expired:
        raise TooMuch(f"takes more than {timed:g} s") from None
    finally:
        _State.active = False
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


class _Expired(BaseException):
    """Raised by the timer. Not an Exception, since untrusted work may catch those."""


def _raise(number: int, frame: Any) -> None:
    """Raise `_Expired`, and fire again a moment later, since an exception in a destructor is lost. Raise nothing in the code around
    the work, or the limits would not be reset."""
    if not _State.active:
        return
    signal.setitimer(signal.ITIMER_VIRTUAL, _AGAIN)
    if frame is None or frame.f_code.co_filename not in _AROUND:
        raise _Expired


def _limit_memory(soft: int, hard: int, added_bytes: int, *, anew: bool) -> None:
    if anew or _State.uses % _MEASURED_EVERY == 0 or _State.pid != os.getpid():
        _State.has_bytes, _State.pid = inside.data_bytes(), os.getpid()
    _State.uses += 1
    limits = [
        _State.has_bytes + added_bytes,
        *(bound for bound in (soft, hard) if bound != resource.RLIM_INFINITY),
    ]
    resource.setrlimit(resource.RLIMIT_DATA, (min(limits), hard))


def in_child(work: Callable[[], object], limits: Limits) -> None:
    """Run `work` in a fork of this process and discard its result and its errors.

    Raises TooMuch if it does not end in time, needs more memory, or ends the process.
    """
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        # Python 3.12 warns of threads, whose locks the fork would wait for: it does nothing but `work`.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        _child(work, writer, limits)
    os.close(writer)
    try:
        answer = _answer(reader, child, limits.seconds)
    finally:
        os.close(reader)
    if answer == b"memory":
        raise TooMuch(f"takes more than {limits.added_bytes / 2**30:g} GiB of memory")
    if answer != b"done":
        raise TooMuch(f"takes more than {limits.seconds:g} s, or ends the process")


_verdicts: dict[tuple[str, str], str] = {}


def trial(what: str, of: str, work: Callable[[], object], limits: Limits) -> str:
    """Return why `work` exceeds its limits; empty if it does not. This process tries it once for each (`what`, `of`).

    what: beginning of the reason, for example "to print a conversation".
    """
    if (what, of) not in _verdicts:
        try:
            in_child(work, limits)
            _verdicts[what, of] = ""
        except TooMuch as error:
            _verdicts[what, of] = f"{what} {error}"
    return _verdicts[what, of]


def check_patterns(settings: Mapping[str, Any], names: Collection[str], where: str, value: str = "") -> None:
    """Check that matching an adapter's patterns with the names of a model's modules, as peft will, ends in time.

    settings: from `adapter_config.json`. where, value: of the problem. Raises UserError if a pattern takes too long.
    """
    values = [settings.get(key) for key in ("target_modules", "exclude_modules", "layers_pattern")]
    values += [[*settings[key]] for key in ("rank_pattern", "alpha_pattern") if isinstance(settings.get(key), dict)]
    patterns = [
        text for each in values for text in (each if isinstance(each, list) else [each]) if isinstance(text, str)
    ]
    patterns = [pattern for pattern in dict.fromkeys(patterns) if _SPECIAL.search(pattern)]
    if not patterns:
        return

    def match() -> None:
        for pattern in patterns:
            with suppress(re.error):
                for form in (re.compile(pattern), re.compile(rf"(.*\.)?({pattern})$")):
                    for name in names:
                        form.match(name)
                        form.fullmatch(name)

    try:
        in_child(match, PATTERNS)
    except TooMuch as error:
        examples = ", ".join(repr(pattern[:60]) for pattern in patterns[:3])
        reason = f"to match its patterns ({examples}) with the names of the model's modules {error}"
        raise UserError(Problem(where, reason, "an adapter whose patterns are plain names", value)) from None


_SPECIAL = re.compile(r"[*+?{(|\[]")
"""Special characters without which a pattern cannot take long."""


def _child(work: Callable[[], object], writer: int, limits: Limits) -> NoReturn:
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        inside.end_after(limits.seconds)
        inside.set_limits(asdict(limits))
        try:
            work()
            answer = b"done"
        except MemoryError:
            answer = b"memory"
        except TooMuch as error:
            answer = b"memory" if "memory" in str(error) else b"time"
        except Exception:  # it comes again, and is reported, where the work is done without a limit
            answer = b"done"
        os.write(writer, answer)
    finally:
        os._exit(0)


def readable(file: int | IO[bytes], seconds: float) -> bool:
    """Return whether `file` has data or ends within `seconds`. Uses `poll`: `select` supports only the first 1024 descriptors."""
    waiting = select.poll()
    waiting.register(file, select.POLLIN)
    return bool(waiting.poll(seconds * 1000))


def _answer(reader: int, child: int, seconds: float) -> bytes:
    """Return what the child wrote, empty if it took too long, and wait for its end."""
    # Its processor time is limited; the wall clock is for one that sleeps, on a machine that has other things to do.
    deadline = time.monotonic() + WALL * seconds
    ready = readable(reader, max(0.0, deadline - time.monotonic()))
    answer = os.read(reader, 16) if ready else b""
    if not ready:
        os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return answer
