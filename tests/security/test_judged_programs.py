"""What a judged program can hold of the machine's memory, and what it can do to its judge."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dstune.core.confinement import control_group
from dstune.core.confinement.table import PROGRAM, Limits
from dstune.grading import sandbox
from dstune.rewards.code import CodeTests
from tests.unit.test_rewards import needs_sandbox, run_as_nobody, score

MIB = 2**20
LIMITS = replace(PROGRAM, seconds=20, memory_bytes=2**28, file_bytes=2**24)

START = """
import ctypes, errno, mmap, os, resource, socket, sys
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = libc.shmat.restype = ctypes.c_void_p
part, held = 2**24, 0
def report():
    print(held >> 20, flush=True)
    os._exit(0)
def refused(error):
    assert error in (errno.EPERM, errno.EACCES, errno.ENOENT, errno.ENOSYS, errno.ENOSPC, errno.ENOMEM, errno.EMFILE), error
"""
HOLDERS = {
    "memfd": """
try:
    descriptor = os.memfd_create("x")
    while held < 2**30:
        held += os.write(descriptor, bytes(part))
except OSError as error:
    refused(error.errno)
report()
""",
    "System V": """
while held < 2**30:
    segment = libc.shmget(0, part, 0o1600)
    if segment < 0:
        refused(ctypes.get_errno())
        report()
    held += part
report()
""",
    "POSIX": """
for name in (b"/x", b"/y"):
    descriptor = libc.shm_open(name, os.O_RDWR | os.O_CREAT, 0o600)
    if descriptor >= 0:
        held += os.write(descriptor, bytes(part))
report()
""",
    "shared and anonymous": """
try:
    while held < 2**30:
        mapped = mmap.mmap(-1, part)
        mapped.write(bytes(part))
        if os.fork() == 0:
            libc.pause()
        mapped.close()
        held += part
except OSError as error:
    refused(error.errno)
report()
""",
    "/dev/zero": """
try:
    descriptor = os.open("/dev/zero", os.O_RDWR)
    while held < 2**30:
        mapped = mmap.mmap(descriptor, part)
        mapped.write(bytes(part))
        held += part
except OSError as error:
    refused(error.errno)
report()
""",
    "tmpfs": """
try:
    with open("/tmp/x", "wb", buffering=0) as file:
        while held < 2**30:
            held += file.write(bytes(part))
except OSError:
    pass
report()
""",
    "empty files": """
try:
    while held < 2**30:
        os.mkdir(f"/tmp/{held}")
        held += 2**10
except OSError as error:
    refused(error.errno)
report()
""",
    "pipes": """
import fcntl
kept = []
try:
    while held < 2**30:
        kept.append(os.pipe())
        try:
            fcntl.fcntl(kept[-1][1], 1031, 2**20)
        except OSError as error:
            refused(error.errno)
        os.set_blocking(kept[-1][1], False)
        try:
            while True:
                held += os.write(kept[-1][1], bytes(2**16))
        except BlockingIOError:
            pass
except OSError as error:
    refused(error.errno)
report()
""",
    "sockets": """
kept = []
try:
    while held < 2**30:
        kept.append(socket.socketpair())
        for end in kept[-1]:
            try:
                end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2**22)
            except OSError as error:
                refused(error.errno)
            end.setblocking(False)
            try:
                while True:
                    held += end.send(bytes(2**15))
            except BlockingIOError:
                pass
except OSError as error:
    refused(error.errno)
report()
""",
    "pages given to a pipe": """
class Vector(ctypes.Structure):
    _fields_ = [("base", ctypes.c_void_p), ("size", ctypes.c_size_t)]
reading, writing = os.pipe()
page = mmap.mmap(-1, 2**16, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
vector = Vector(ctypes.addressof(ctypes.c_char.from_buffer(page)), 2**16)
if libc.vmsplice(writing, ctypes.byref(vector), 1, 8) > 0:
    held = 2**30
report()
""",
}
OF_THE_KERNEL = {
    "connections that wait to be accepted": """
listening = socket.socket(socket.AF_UNIX)
try:
    listening.bind("\\0x")
    listening.listen(4096)
    while held < 2**30:
        with socket.socket(socket.AF_UNIX) as end:
            end.setblocking(False)
            end.connect("\\0x")
            try:
                while True:
                    held += end.send(bytes(2**15))
            except BlockingIOError:
                pass
except BlockingIOError:
    pass
except OSError as error:
    refused(error.errno)
report()
""",
    "datagrams": """
kept = []
try:
    for number in range(40):
        kept.append(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
        kept[-1].bind(f"\\0{number}")
        try:
            while held < 2**30:
                with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as end:
                    end.setblocking(False)
                    held += end.sendto(bytes(200_000), f"\\0{number}")
        except BlockingIOError:
            pass
except OSError as error:
    refused(error.errno)
report()
""",
    "pages given to a socket": """
kept, (reading, writing) = [], os.pipe()
file = os.open("/tmp/x", os.O_RDWR | os.O_CREAT)
try:
    for number in range(20):
        kept.append(socket.socketpair())
        kept[-1][1].setblocking(False)
        try:
            while True:
                os.ftruncate(file, 0)
                os.write(file, bytes(2**16))
                os.lseek(file, 0, os.SEEK_SET)
                for page in range(16):
                    os.splice(file, writing, 1, offset_src=4096 * page)
                try:
                    os.splice(reading, kept[-1][1].fileno(), 16)
                finally:
                    os.set_blocking(reading, False)
                held += 2**16
        except BlockingIOError:
            os.read(reading, 16)
except OSError as error:
    refused(error.errno)
report()
""",
    "pages sent to a socket": """
kept = []
file = os.open("/tmp/x", os.O_RDWR | os.O_CREAT)
try:
    for number in range(20):
        kept.append(socket.socketpair())
        kept[-1][1].setblocking(False)
        try:
            while True:
                os.ftruncate(file, 0)
                os.pwrite(file, bytes(2**20), 0)
                for page in range(256):
                    os.sendfile(kept[-1][1].fileno(), file, 4096 * page, 1)
                    held += 4096
        except BlockingIOError:
            pass
except OSError as error:
    refused(error.errno)
report()
""",
    "a table of waiting threads": """
for number in range(8):
    if libc.prctl(78, 1, 2**22, 0, 0) == 0:
        held += 2**28
    if os.fork() == 0:
        libc.pause()
report()
""",
    "rules of Landlock": """
kept = []
for number in range(4):
    kept.append(libc.syscall(444, (ctypes.c_uint64 * 3)(0, 3, 0), 24, 0))
    rule = (ctypes.c_uint64 * 2)(3, 0)
    for port in range(2**16):
        rule[1] = port
        if libc.syscall(445, kept[-1], 2, rule, 0):
            report()
        held += 100
report()
""",
}
MOST_MIB = {"tmpfs": 16, "empty files": 10, "pipes": 8, "sockets": 16}
"""What each may hold, of the limits above: those that are missing may hold nothing."""

EVERYWHERE = """
import time
for number in range(8):
    if os.fork() == 0:
        kept = bytearray(2**27)
        kept[::4096] = bytes(len(kept[::4096]))
        time.sleep(60)
time.sleep(60)
"""


def outcome_of(source: str, user: str) -> sandbox.Outcome:
    if user == "root":
        return sandbox.run_program(source, "", LIMITS)
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        return run_as_nobody(source, Path(folder), LIMITS)


USERS = ["root", "nobody"] if os.geteuid() == 0 else ["root"]


@needs_sandbox
@pytest.mark.parametrize("user", USERS)
@pytest.mark.parametrize("holder", HOLDERS)
def test_a_program_holds_no_memory_outside_of_its_limit(holder: str, user: str) -> None:
    outcome = outcome_of(START + HOLDERS[holder], user)
    assert not outcome.failure, outcome
    assert int(outcome.output) <= MOST_MIB.get(holder, 0)


@needs_sandbox
@pytest.mark.parametrize("user", USERS)
@pytest.mark.parametrize("holder", OF_THE_KERNEL)
def test_a_program_holds_no_memory_of_the_kernel(holder: str, user: str) -> None:
    outcome = outcome_of(START + OF_THE_KERNEL[holder], user)
    assert not outcome.failure, outcome
    assert int(outcome.output) == 0


@needs_sandbox
@pytest.mark.parametrize("user", USERS)
def test_the_processes_of_a_program_have_one_limit_of_memory(user: str) -> None:
    """Eight times 128 MiB, each of which is below the limit of one process."""
    outcome = outcome_of(START + EVERYWHERE, user)
    assert outcome.failure == "it took more than 0.25 GiB of memory"


@needs_sandbox
def test_memory_that_processes_share_since_a_fork_counts_once_where_it_can_be_seen() -> None:
    if os.geteuid():
        pytest.skip("needs root, which may read the shares of a page")
    source = """
import time
kept = bytearray(2**27)
kept[::4096] = bytes(len(kept[::4096]))
for number in range(8):
    if os.fork() == 0:
        time.sleep(1)
        os._exit(0)
time.sleep(1)
print("done", flush=True)
"""
    assert outcome_of(START + source, "root").output == "done\n"


FAST = """
import os, time
for number in range(4):
    if os.fork() == 0:
        kept = b"x" * (100 * 2**20)
        time.sleep(20)
time.sleep(20)
"""
"""Each process takes less than it may, and all of them more."""


@needs_sandbox
def test_the_kernel_ends_a_program_that_takes_more_than_its_control_group_may(monkeypatch: pytest.MonkeyPatch) -> None:
    if reason := control_group.missing_reason():
        pytest.skip(f"{reason}; run it in a service with a group of its own: Delegate=memory, DelegateSubgroup=main")
    monkeypatch.setattr(sandbox, "private_bytes", lambda process: 0)
    limits = replace(LIMITS, memory_bytes=2**27)
    outcome = sandbox.run_program("print(open('/proc/self/cgroup').read())", "", limits)
    assert f"/{control_group.PREFIX}" in outcome.output and not outcome.failure
    assert sandbox.run_program(FAST, "", limits).failure == "it took more than 0.125 GiB of memory"
    parent, _ = control_group._parent_or_reason()
    assert parent is not None and not list(parent.glob(f"{control_group.PREFIX}*{os.getpid()}*"))


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that behaves as a delegated group: a folder that is made in it has a group's files, with which it is removed."""
    (tmp_path / "main").mkdir()
    files = {"cgroup.procs": "", "cgroup.controllers": "cpu memory pids\n", "cgroup.subtree_control": "pids\n"}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
        (tmp_path / "main" / name).write_text(text)
    make, remove = Path.mkdir, Path.rmdir

    def mkdir(folder: Path, *arguments: Any, **options: Any) -> None:
        make(folder, *arguments, **options)
        if folder.parent == tmp_path:
            has_memory = "memory" in (tmp_path / "cgroup.subtree_control").read_text()
            for name in ("cgroup.procs", "cgroup.kill", *(("memory.max", "memory.oom.group") if has_memory else ())):
                (folder / name).touch()
            (folder / "memory.events").write_text("low 0\noom 0\noom_kill 0\n")

    def rmdir(folder: Path) -> None:
        if folder.parent == tmp_path:
            for file in folder.iterdir():
                shutil.copy(file, tmp_path.parent / f"last-{file.name}")
                file.unlink()
        remove(folder)

    monkeypatch.setattr(Path, "mkdir", mkdir)
    monkeypatch.setattr(Path, "rmdir", rmdir)
    monkeypatch.setattr(control_group, "_group_of_this_process", lambda: tmp_path / "main")
    control_group._parent_or_reason.cache_clear()
    yield tmp_path
    control_group._parent_or_reason.cache_clear()


@needs_sandbox
def test_a_program_runs_in_a_control_group_where_this_process_can_make_one(groups: Path) -> None:
    """Against a folder with the documented files; the test above is the real one."""
    outcome = sandbox.run_program("import os\nprint(os.getppid() > 0)", "", LIMITS)
    assert outcome.output == "True\n" and not outcome.failure
    last = {file.name.removeprefix("last-"): file.read_text() for file in groups.parent.glob("last-*")}
    assert last["memory.max"] == str(LIMITS.memory_bytes + LIMITS.file_bytes + sandbox.KERNEL_BYTES)
    assert (last["memory.oom.group"], last["cgroup.kill"]) == ("1", "1") and int(last["cgroup.procs"]) > 1
    assert not list(groups.glob(f"{control_group.PREFIX}*"))


def test_a_group_that_was_ended_for_its_memory_says_so(groups: Path) -> None:
    with control_group.memory_group(2**20) as group:
        assert group is not None and not group.is_exceeded
        (folder,) = groups.glob(f"{control_group.PREFIX}*")
        (folder / "memory.events").write_text("low 0\noom 2\noom_kill 1\n")
        assert group.is_exceeded


@needs_sandbox
@pytest.mark.parametrize("missing", ["mount", "controller", "right"])
def test_a_missing_control_group_is_named_once(
    missing: str, groups: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if missing == "mount":
        monkeypatch.setattr(control_group, "_group_of_this_process", lambda: None)
    elif missing == "controller":
        (groups / "cgroup.controllers").write_text("cpu pids\n")
    else:
        monkeypatch.setattr("os.access", lambda path, mode: False)
    sandbox._warn_of_missing_group.cache_clear()
    outcomes = [sandbox.run_program("print(1)", "", LIMITS) for _ in range(2)]
    assert [outcome.output for outcome in outcomes] == ["1\n"] * 2
    assert len([record for record in caplog.records if "no control group" in record.message]) == 1


@needs_sandbox
@pytest.mark.parametrize("stream", [1, 2])
def test_a_program_that_changes_its_streams_costs_no_other_row_its_score(stream: int) -> None:
    """O_DIRECT on a file that judge and program share made the judge's own read fail."""
    flags = f"fcntl.fcntl({stream}, fcntl.F_SETFL, os.O_DIRECT | os.O_NONBLOCK | os.O_APPEND)"
    spoiled = f"import fcntl, os\nos.write(2, b'x' * 5001)\n{flags}\nprint(4)"
    tests = [[{"input": "", "output": "4"}]] * 3
    scores = CodeTests()(None, ["print(4)", spoiled, "print(5)"], None, tests=tests)
    assert scores == [1.0, 1.0, 0.0]


@needs_sandbox
def test_a_judge_that_fails_costs_one_row_its_score(monkeypatch: pytest.MonkeyPatch) -> None:
    def run_program(source: str, stdin: str, limits: Limits) -> sandbox.Outcome:
        if "fails" in source:
            raise OSError("the judge fails")
        return sandbox.run_program(source, stdin, limits)

    monkeypatch.setattr("dstune.rewards.code.run_program", run_program)
    tests = [[{"input": "", "output": "4"}]] * 2
    assert CodeTests()(None, ["fails", "print(4)"], None, tests=tests) == [None, 1.0]


def test_a_broken_schema_costs_one_row_its_score() -> None:
    schemas = [{"type": "integer"}, "{", {"type": 7}, {"$ref": "http://192.0.2.1/schema.json"}, {"pattern": "("}, [1]]
    texts = ["1", "1", "1", "1", '"a"', "1"]
    assert score("json_schema", texts, schema=schemas) == [1.0, None, None, None, None, None]


def test_what_json_does_not_have_is_no_number() -> None:
    texts = ["1e3", "NaN", "Infinity", "-Infinity"]
    assert score("json_schema", texts, schema=[{"type": "number"}] * 4) == [1.0, 0.0, 0.0, 0.0]
    assert score("json_object", ['{"a": NaN}', '{"a": 1}']) == [0.0, 1.0]
