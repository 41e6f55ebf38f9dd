"""Runs a Python program isolated from the machine: `python -I sandbox_child.py LIMITS`, with the program on standard input.

`dstune.grading.sandbox` starts it. It imports nothing of dstune and needs Linux. There are three processes:

- the outer one makes the namespaces (user, mount, PID, network, IPC, UTS) and waits,
- the first process inside builds the file system: empty, with the interpreter and the system's libraries read-only,
- the second process inside gives up every privilege, sets its limits, filters its system calls
  (`core/confinement`) and runs the program.

When the first process inside ends, the kernel kills everything that the program has started.
"""

from __future__ import annotations

import ctypes
import json
import os
import runpy
import signal
import struct
import sys
from contextlib import suppress
from typing import Any, NoReturn

NAMESPACES = 0x10000000 | 0x00020000 | 0x20000000 | 0x40000000 | 0x08000000 | 0x04000000
"""CLONE_NEWUSER, NEWNS, NEWPID, NEWNET, NEWIPC, NEWUTS."""
NOBODY = 65534
READ_ONLY, NO_SUID, NO_DEVICES = 1, 2, 4
BIND, RECURSIVE, PRIVATE = 4096, 16384, 1 << 18
DETACH = 2
PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
MOUNT_SETATTR = 442
AT_RECURSIVE = 0x8000
PR_SET_PDEATHSIG, PR_SET_DUMPABLE = 1, 4
UNAVAILABLE = 71
"""Exit code if the sandbox cannot be built. The reason is on standard error, and no byte comes through the pipe `stands` (a file
descriptor among the limits)."""
OUT_OF_TIME = 124
"""Exit code if the program's time was over. A program that itself exits with this code is reported with 1."""
CONFINEMENT = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "core", "confinement")
FILTERED, UNFILTERED = b"f", b"u"
"""Byte that the sandbox writes to `stands` when the program is about to run: with or without a filter of system calls."""
DEVICES = ("/dev/null", "/dev/random", "/dev/urandom")
"""Without /dev/zero, since to map it shared makes memory that belongs to no process."""

libc = ctypes.CDLL(None, use_errno=True)


def main() -> None:
    limits = json.loads(sys.argv[1])
    program = json.loads(sys.stdin.buffer.read())
    # Loaded by their paths, since `python -I` does not find the package, and now, since the files will soon be out of sight.
    inside = {**runpy.run_path(f"{CONFINEMENT}/inside.py"), **runpy.run_path(f"{CONFINEMENT}/system_calls.py")}
    try:
        enter_namespaces()
    except OSError as error:
        give_up(error)
    first = os.fork()
    if first == 0:
        run_first_process(limits, program, inside)
    os.close(limits["stands"])
    _, status = os.waitpid(first, 0)
    os._exit(os.waitstatus_to_exitcode(status) & 0xFF)


def enter_namespaces() -> None:
    """Enter new namespaces. The only user inside is the present one; if that is root, also `nobody`, who will run the program,
    since the kernel does not limit the number of root's processes."""
    user, group = os.geteuid(), os.getegid()
    users = "0 0 1\n65534 65534 1\n" if user == 0 else f"{user} {user} 1\n"
    groups = "0 0 1\n65534 65534 1\n" if user == 0 else f"{group} {group} 1\n"
    outer = os.getpid()
    unshared_reader, unshared_writer = os.pipe()
    map_writer = os.fork()
    if map_writer == 0:  # stays outside of the namespaces, where it may write the maps
        os.close(unshared_writer)
        code = 1
        if os.read(unshared_reader, 1):
            try:
                if user:
                    write_line(f"/proc/{outer}/setgroups", "deny")
                write_line(f"/proc/{outer}/uid_map", users)
                write_line(f"/proc/{outer}/gid_map", groups)
                code = 0
            except OSError as error:
                code = error.errno or 1
        os._exit(code)
    try:
        call("unshare", NAMESPACES)
        os.write(unshared_writer, b"x")
    finally:
        os.close(unshared_writer)
        os.close(unshared_reader)
        _, status = os.waitpid(map_writer, 0)
    if code := os.waitstatus_to_exitcode(status):
        raise OSError(code, f"users cannot be mapped ({os.strerror(code)})")


def run_first_process(limits: dict[str, Any], program: dict[str, Any], inside: dict[str, Any]) -> NoReturn:
    """Build the file system, start the process that runs the program, and exit with its code or when its time is over.

    inside: the functions of `core/confinement/inside.py` and `system_calls.py`.
    """
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    libc.prctl(PR_SET_DUMPABLE, 0)  # keeps the program from reading this process
    try:
        forbid_more_namespaces()
        build_file_system(limits)
    except OSError as error:
        give_up(error)
    second = os.fork()
    if second == 0:
        try:
            give_up_privileges()
            inside["gain_no_privileges"]()
            inside["set_limits"](limits)
            is_filtered = inside["deny_system_calls"]()
        except OSError as error:
            give_up(error)
        os.write(limits["stands"], FILTERED if is_filtered else UNFILTERED)
        os.close(limits["stands"])
        run_program(program)
    os.close(limits["stands"])
    signal.signal(signal.SIGALRM, lambda *_: os._exit(OUT_OF_TIME))
    signal.setitimer(signal.ITIMER_REAL, limits["seconds"])
    while True:  # orphaned processes of the program become children of this one
        ended_pid, status = os.wait()
        if ended_pid == second:
            code = os.waitstatus_to_exitcode(status)
            code = code & 0xFF if code >= 0 else 128 - code
            os._exit(1 if code == OUT_OF_TIME else code)


def forbid_more_namespaces() -> None:
    """Forbid further namespaces inside this user namespace: most attacks on the kernel need one."""
    with suppress(OSError):  # a second barrier only: the mounts cannot be changed without it either
        write_line("/proc/sys/user/max_user_namespaces", "0")


def build_file_system(limits: dict[str, Any]) -> None:
    """Mount an empty file system at `root`, show the interpreter and the system's libraries in it, and make it the root."""
    root = limits["root"]
    mount("none", "/", None, RECURSIVE | PRIVATE)
    mount(
        "tmpfs",
        root,
        "tmpfs",
        NO_SUID | NO_DEVICES,
        f"size={limits['file_bytes']},nr_inodes={limits['files']},mode=755",
    )
    for path in dict.fromkeys([*limits["paths"], sys.base_prefix, sys.prefix]):
        show_read_only(path, root)
    os.makedirs(f"{root}/dev")
    for path in DEVICES:
        show_file(path, root)
    os.makedirs(f"{root}/proc")
    with suppress(OSError):  # not allowed in containers that hide parts of their own /proc
        mount("proc", f"{root}/proc", "proc", NO_SUID | NO_DEVICES)
    for folder in ("tmp", "work", "old"):
        os.makedirs(f"{root}/{folder}", exist_ok=True)  # the interpreter may lie below it
        os.chmod(f"{root}/{folder}", 0o1777)
    os.chdir(root)
    check(libc.syscall(PIVOT_ROOT[os.uname().machine], b".", b"old"), "pivot_root")
    os.chdir("/work")
    check(libc.umount2(b"/old", DETACH), "umount")
    os.rmdir("/old")


def show_read_only(path: str, root: str) -> None:
    """Make a file or folder of the machine visible under `root`, read-only; nothing happens if the machine does not have it."""
    if not os.path.exists(path):
        return
    if os.path.islink(path) and os.path.dirname(path) == "/":  # /lib -> usr/lib
        os.symlink(os.readlink(path), root + path)
        return
    if not os.path.isdir(path):
        show_file(path, root)
        return
    if os.path.ismount(root + path):
        return
    if not os.path.isdir(root + path):  # it exists if it lies in a folder that is visible already
        os.makedirs(root + path)
    mount(path, root + path, None, BIND | RECURSIVE)
    make_read_only(root + path)


def show_file(path: str, root: str) -> None:
    os.makedirs(os.path.dirname(root + path), exist_ok=True)
    with open(root + path, "w"):
        pass
    mount(path, root + path, None, BIND)
    if not path.startswith("/dev/"):
        make_read_only(root + path)


def make_read_only(path: str) -> None:
    attributes = struct.pack("QQQQ", READ_ONLY | NO_SUID, 0, 0, 0)
    result = libc.syscall(MOUNT_SETATTR, -100, path.encode(), AT_RECURSIVE, attributes, len(attributes))
    check(result, "mount_setattr (Linux 5.12 or newer)")


def give_up_privileges() -> None:
    """Become `nobody` if this is root, and drop all capabilities for good."""
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    # Header: version 3, this process. Data: no capability in any of the three sets.
    check(libc.capset(struct.pack("Ii", 0x20080522, 0), bytes(24)), "capset")


def run_program(program: dict[str, Any]) -> NoReturn:
    """Run the program with its `stdin` as standard input and this process's standard output, and exit with its code."""
    reading, writing = os.pipe()
    feeder = os.fork()
    if feeder == 0:
        os.close(reading)
        with suppress(OSError), os.fdopen(writing, "wb") as pipe:  # the program may end without reading its input
            pipe.write(program["stdin"].encode())
        os._exit(0)
    os.close(writing)
    os.dup2(reading, 0)
    os.close(reading)
    sys.stdin = os.fdopen(0, encoding="utf-8", closefd=False)
    code = 0
    try:
        exec(compile(program["source"], "<program>", "exec"), {"__name__": "__main__"})
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException as error:
        print(f"{type(error).__name__}: {error}"[:500], file=sys.stderr)
        code = 1
    with suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code & 0xFF)


def mount(source: str, target: str, kind: str | None, flags: int, options: str = "") -> None:
    encoded = [None if text is None else text.encode() for text in (source, target, kind)]
    check(libc.mount(*encoded, ctypes.c_ulong(flags), options.encode() or None), f"mount {target}")


def call(name: str, *arguments: Any) -> None:
    check(getattr(libc, name)(*arguments), name)


def check(result: int, operation: str) -> None:
    """Raise OSError if a function of the C library has failed."""
    if result:
        code = ctypes.get_errno()
        raise OSError(code, f"{operation}: {os.strerror(code)}")


def write_line(path: str, text: str) -> None:
    descriptor = os.open(path, os.O_WRONLY)
    try:
        os.write(descriptor, text.encode())
    finally:
        os.close(descriptor)


def give_up(error: OSError) -> NoReturn:
    """Exit, since the sandbox cannot be built."""
    print(error.strerror or str(error), file=sys.stderr, flush=True)
    os._exit(UNAVAILABLE)


if __name__ == "__main__":
    main()
