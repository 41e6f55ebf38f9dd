"""A seccomp filter for programs of strangers: it denies the system calls that ordinary programs do not need and attacks use.

The module imports nothing of dstune, since `sandbox_child.py` loads it by its path.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct

DENIED = {
    # name: (number on x86_64, number on aarch64); None if the architecture does not have the call
    "acct": (163, 89),
    "add_key": (248, 217),
    "adjtimex": (159, 171),
    "bpf": (321, 280),
    "chroot": (161, 51),
    "clock_adjtime": (305, 266),
    "clock_settime": (227, 112),
    "delete_module": (176, 106),
    "fanotify_init": (300, 262),
    "finit_module": (313, 273),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fsopen": (430, 430),
    "fspick": (433, 433),
    "init_module": (175, 105),
    "io_setup": (206, 0),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "io_uring_setup": (425, 425),
    "ioperm": (173, None),
    "iopl": (172, None),
    "kcmp": (312, 272),
    "kexec_file_load": (320, 294),
    "kexec_load": (246, 104),
    "keyctl": (250, 219),
    "landlock_add_rule": (445, 445),
    "landlock_create_ruleset": (444, 444),
    "landlock_restrict_self": (446, 446),
    "listen": (50, 201),
    "lookup_dcookie": (212, 18),
    "mbind": (237, 235),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "migrate_pages": (256, 238),
    "modify_ldt": (154, None),
    "mount": (165, 40),
    "mount_setattr": (442, 442),
    "move_mount": (429, 429),
    "move_pages": (279, 239),
    "mq_open": (240, 180),
    "msgget": (68, 186),
    "name_to_handle_at": (303, 264),
    "nfsservctl": (180, 42),
    "open_by_handle_at": (304, 265),
    "open_tree": (428, 428),
    "open_tree_attr": (467, 467),
    "perf_event_open": (298, 241),
    "personality": (135, 92),
    "pidfd_getfd": (438, 438),
    "pivot_root": (155, 41),
    "process_madvise": (440, 440),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "ptrace": (101, 117),
    "quotactl": (179, 60),
    "quotactl_fd": (443, 443),
    "reboot": (169, 142),
    "request_key": (249, 218),
    "set_mempolicy": (238, 237),
    "semget": (64, 190),
    "sendfile": (40, 71),
    "setdomainname": (171, 162),
    "sethostname": (170, 161),
    "setns": (308, 268),
    "settimeofday": (164, 170),
    "shmat": (30, 196),
    "shmget": (29, 194),
    "splice": (275, 76),
    "swapoff": (168, 225),
    "swapon": (167, 224),
    "syslog": (103, 116),
    "umount2": (166, 39),
    "unshare": (272, 97),
    "userfaultfd": (323, 282),
    "vhangup": (153, 58),
    "vmsplice": (278, 75),
}
"""System calls that no program under test needs, and that attacks on the kernel begin with, or that hold memory outside of any
process. They fail with EPERM.

Some of the latter are not obvious. `listen`: each of the 4,096 connections that wait to be accepted keeps its 200 KiB after the
sender has closed its end. `splice`, `sendfile`: a socket counts the one byte of a page that it gets, and keeps the page after its
file is gone. `landlock_add_rule`: a set takes a rule of 100 bytes for each of 65,536 ports. `io_setup` uses up what the
whole machine may have. Python copies files without `sendfile` where it fails.
"""
DENIED_ARGUMENTS = (
    # (name, numbers of the call, index of the argument, its value, whether that is a set of bits of which all are set)
    ("fcntl", (72, 25), 1, 1031, False),  # F_SETPIPE_SZ
    ("mmap", (9, 222), 3, 0x21, True),  # MAP_SHARED | MAP_ANONYMOUS
    ("prctl", (157, 167), 0, 78, False),  # PR_FUTEX_HASH: a table of up to 1 GiB
    ("setsockopt", (54, 208), 2, 7, False),  # SO_SNDBUF
    ("setsockopt", (54, 208), 2, 8, False),  # SO_RCVBUF
    ("socket", (41, 198), 1, 2, True),  # SOCK_DGRAM, SOCK_RAW: what was sent stays after the sender has closed its end
)
"""Calls that fail with EPERM with one value of an argument only: they make buffers larger, or memory that belongs to no process."""
CLONE, CLONE3, SOCKET = (56, 220), (435, 435), (41, 198)
NEW_NAMESPACES = 0x7E020000
"""CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET."""
FAMILIES = (1, 2, 10)
"""AF_UNIX, AF_INET, AF_INET6: the address families that sockets may have. The namespace has no network."""

ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
"""By machine: the index of its numbers in the tuples above, and its AUDIT_ARCH."""
X32 = 0x40000000
"""Bit in the numbers of the x32 calls, a second set of calls on x86_64."""
NUMBER, ARCHITECTURE, FIRST_ARGUMENT = 0, 4, 16
"""Offsets in `struct seccomp_data`; that of the argument is its lower half, on little-endian machines."""
LOAD, EQUALS, AT_LEAST, ANY_BIT, AND, RETURN = 0x20, 0x15, 0x35, 0x45, 0x54, 0x06
ALLOW, FAIL, KILL = 0x7FFF0000, 0x00050000, 0x80000000
PR_SET_SECCOMP, FILTER = 22, 2

Instruction = tuple[int, int, int, int]
"""`struct sock_filter`: code, instructions to skip if the comparison holds, instructions to skip if not, operand."""


def deny_system_calls() -> bool:
    """Install the filter for this process and all that it starts. Return False if the kernel or processor has no filters.

    The process must have given up the right to gain privileges (no_new_privs).

    Raises:
        OSError: the kernel has filters and refuses this one.
    """
    machine = os.uname().machine
    if machine not in ARCHITECTURES:
        return False
    instructions = filter_of(machine)
    code = b"".join(struct.pack("HBBI", *instruction) for instruction in instructions)
    buffer = ctypes.create_string_buffer(code, len(code))
    program = struct.pack("HxxxxxxP", len(instructions), ctypes.addressof(buffer))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_SECCOMP, FILTER, ctypes.c_char_p(program), 0, 0) == 0:
        return True
    error_number = ctypes.get_errno()
    if error_number in (errno.EINVAL, errno.ENOSYS):  # a kernel built without seccomp filters
        return False
    raise OSError(error_number, f"seccomp: {os.strerror(error_number)}")


def filter_of(machine: str) -> list[Instruction]:
    """Assemble the filter as a BPF program."""
    index, architecture = ARCHITECTURES[machine]
    program: list[Instruction] = [(LOAD, 0, 0, ARCHITECTURE), (EQUALS, 1, 0, architecture), (RETURN, 0, 0, KILL)]
    program += [(LOAD, 0, 0, NUMBER), (AT_LEAST, 0, 1, X32), (RETURN, 0, 0, KILL)]
    for numbers in DENIED.values():
        if (number := numbers[index]) is not None:
            program += [(EQUALS, 0, 1, number), (RETURN, 0, 0, FAIL | errno.EPERM)]
    # A filter cannot follow the pointer to clone3's flags. With ENOSYS, the C library falls back to `clone`.
    program += [(EQUALS, 0, 1, CLONE3[index]), (RETURN, 0, 0, FAIL | errno.ENOSYS)]
    for _, numbers, argument, value, are_bits in DENIED_ARGUMENTS:
        test = [(AND, 0, 0, value)] if are_bits else []
        test += [(EQUALS, 0, 1, value), (RETURN, 0, 0, FAIL | errno.EPERM), (LOAD, 0, 0, NUMBER)]
        program += [(EQUALS, 0, 1 + len(test), numbers[index]), (LOAD, 0, 0, FIRST_ARGUMENT + 8 * argument), *test]
    program += [(EQUALS, 0, 4, CLONE[index]), (LOAD, 0, 0, FIRST_ARGUMENT)]
    program += [(ANY_BIT, 0, 1, NEW_NAMESPACES), (RETURN, 0, 0, FAIL | errno.EPERM), (RETURN, 0, 0, ALLOW)]
    program += [(EQUALS, 0, 2 + len(FAMILIES), SOCKET[index]), (LOAD, 0, 0, FIRST_ARGUMENT)]
    program += [(EQUALS, len(FAMILIES) - number, 0, family) for number, family in enumerate(FAMILIES)]
    program += [(RETURN, 0, 0, FAIL | errno.EAFNOSUPPORT)]
    return [*program, (RETURN, 0, 0, ALLOW)]
