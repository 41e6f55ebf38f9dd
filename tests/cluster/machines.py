"""Several machines on one: each is a set of namespaces with a network, a host name, processes and an sshd of its own.

`head` is 10.77.0.100 and `node1`, `node2`, ... are 10.77.0.1, 10.77.0.2, ...; they share the file system, as over NFS. No
interface is made in the network of the machine itself. Killing a machine's first process ends everything in it, without
a word to those who are connected to it: what a power failure does.

Needs root, and Debian's openssh-server, openssh-client, iproute2 (unshare and nsenter are part of util-linux).
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

PROGRAMS = {"ip": "iproute2", "/usr/sbin/sshd": "openssh-server", "ssh": "openssh-client", "unshare": "util-linux"}
NETWORK = "10.77.0"
CLONE_NEWNET = 0x40000000
SSHD = """\
HostKey {root}/ssh/host_key
AuthorizedKeysFile {root}/ssh/authorized_keys
PermitRootLogin prohibit-password
PasswordAuthentication no
KbdInteractiveAuthentication no
UsePAM no
StrictModes no
PidFile none
MaxStartups 100
MaxSessions 100
AcceptEnv LANG
Port 22
Port 2222
"""
SSH = """\
Host *
  IdentityFile {root}/ssh/id_ed25519
  IdentitiesOnly yes
  StrictHostKeyChecking no
  UserKnownHostsFile /dev/null
  LogLevel ERROR
"""
FIRST_PROCESS = """\
mount --make-rprivate /
hostname "$1"
mount --bind "$2/hosts" /etc/hosts
mount --bind "$2/ssh/ssh_config" /etc/ssh/ssh_config
mount -t tmpfs -o mode=1777 shm /dev/shm
mount -t tmpfs -o mode=755 run /run
mkdir -p /run/sshd /run/lock
# Process numbers of an earlier machine would come again, and with them names of files in the /tmp that all share (mpirun's).
echo $((1000 + RANDOM)) >/proc/sys/kernel/ns_last_pid
/usr/sbin/sshd -D -e -f "$2/ssh/sshd_config" 2>>"$2/sshd.$1.log" &
touch "$2/$1.ready"
while :; do sleep 3600 & wait $!; done
"""


def missing() -> str | None:
    """Why no machines can be made here, or None."""
    absent = sorted({package for program, package in PROGRAMS.items() if shutil.which(program) is None})
    if absent:
        return f"not installed (Debian: apt-get install {' '.join(absent)})"
    if os.geteuid() != 0:
        return "network namespaces need root"
    probe = subprocess.run(["unshare", "--net", "--mount", "--pid", "--fork", "true"], capture_output=True, text=True)
    return None if probe.returncode == 0 else f"namespaces are not allowed here: {probe.stderr.strip()}"


class Machines:
    """`head` and `count` nodes; a context manager."""

    def __init__(self, root: Path, count: int = 2):
        self.root = root
        self.names = ["head", *(f"node{number}" for number in range(1, count + 1))]
        self._prefix = f"dst{os.getpid()}"
        self._first: dict[str, int] = {}
        """The process with number 1 of each machine, by its number here."""
        self._starters: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Machines:
        try:
            self._write_files()
            # A connection that a test makes from outside by mistake fails at once instead of leaving this machine.
            subprocess.run(["ip", "route", "add", "unreachable", f"{NETWORK}.0/24"], capture_output=True)
            hub = f"{self._prefix}-hub"
            _do("ip", "netns", "add", hub)
            _do("ip", "-n", hub, "link", "add", "br0", "type", "bridge")
            _do("ip", "-n", hub, "link", "set", "br0", "up")
            for name in self.names:
                self._wire(name)
                self.start(name)
            for name in self.names:
                _wait(lambda name=name: self.on("head", "ssh", name, "true").returncode == 0, f"sshd of {name}")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        for name in list(self._first):
            self.kill(name)
        listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout.split()
        for namespace in [word for word in listed if word.startswith(f"{self._prefix}-")]:
            subprocess.run(["ip", "netns", "del", namespace], capture_output=True)
        if not [word for word in listed if word.startswith("dst") and not word.startswith(self._prefix)]:
            subprocess.run(["ip", "route", "del", "unreachable", f"{NETWORK}.0/24"], capture_output=True)

    def start(self, name: str) -> None:
        """Start a machine, or one that was killed again."""
        (self.root / f"{name}.ready").unlink(missing_ok=True)
        _do("ip", "-n", f"{self._prefix}-hub", "link", "set", f"v-{name}", "up")
        inside = ["unshare", "--mount", "--uts", "--ipc", "--pid", "--fork", "--kill-child=KILL", "--mount-proc"]
        starter = subprocess.Popen(
            [
                *("nsenter", f"--net=/run/netns/{self._prefix}-{name}", *inside),
                *("bash", str(self.root / "first.sh"), name, str(self.root)),
            ],
            stdin=subprocess.DEVNULL,
            stdout=(self.root / f"first.{name}.log").open("ab"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        _wait((self.root / f"{name}.ready").exists, f"{name} to start")
        children = Path(f"/proc/{starter.pid}/task/{starter.pid}/children").read_text().split()
        self._first[name], self._starters[name] = int(children[0]), starter

    def kill(self, name: str) -> None:
        """End a machine and everything in it at once. Its cable goes first, or the kernel would close its connections."""
        subprocess.run(["ip", "-n", f"{self._prefix}-hub", "link", "set", f"v-{name}", "down"], capture_output=True)
        os.kill(self._first.pop(name), signal.SIGKILL)
        self._starters.pop(name).wait()

    def is_up(self, name: str) -> bool:
        """Whether a machine was started, and not killed since."""
        return name in self._first

    def first_process(self, name: str) -> int:
        """The number that the first process of a machine has here."""
        return self._first[name]

    def disconnect(self, name: str) -> None:
        """Pull a machine's cable: what runs there goes on, and every connection to it falls silent."""
        _do("ip", "-n", f"{self._prefix}-hub", "link", "set", f"v-{name}", "down")

    def reconnect(self, name: str) -> None:
        _do("ip", "-n", f"{self._prefix}-hub", "link", "set", f"v-{name}", "up")

    def command(self, name: str, words: Sequence[str], folder: Path | None = None) -> list[str]:
        """The command line that runs `words` on a machine, in `folder`."""
        entering = ["nsenter", "-t", str(self._first[name]), "--net", "--uts", "--mount", "--ipc", "--pid"]
        return [*entering, f"--wdns={folder or Path.cwd()}", "--", *words]

    def on(self, name: str, *words: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
        return subprocess.run(self.command(name, words), capture_output=True, text=True, timeout=timeout)

    @contextmanager
    def network(self, name: str) -> Iterator[None]:
        """Connections that this thread opens are those of a machine."""
        with open("/proc/thread-self/ns/net") as own, open(f"/proc/{self._first[name]}/ns/net") as other:
            _enter(other.fileno())
            try:
                yield
            finally:
                _enter(own.fileno())

    def _wire(self, name: str) -> None:
        hub, own = f"{self._prefix}-hub", f"{self._prefix}-{name}"
        _do("ip", "netns", "add", own)
        _do("ip", "-n", hub, "link", "add", f"v-{name}", "type", "veth", "peer", "name", "eth0", "netns", own)
        _do("ip", "-n", hub, "link", "set", f"v-{name}", "master", "br0", "up")
        _do("ip", "-n", own, "addr", "add", f"{self.address(name)}/24", "dev", "eth0")
        for device in ("lo", "eth0"):
            _do("ip", "-n", own, "link", "set", device, "up")

    def address(self, name: str) -> str:
        return f"{NETWORK}.{100 if name == 'head' else name.removeprefix('node')}"

    def _write_files(self) -> None:
        keys = self.root / "ssh"
        keys.mkdir(parents=True, mode=0o700)
        for key in ("id_ed25519", "host_key"):
            _do("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", key, "-f", str(keys / key))
        shutil.copy(keys / "id_ed25519.pub", keys / "authorized_keys")
        for name, text in (("sshd_config", SSHD), ("ssh_config", SSH)):
            (keys / name).write_text(text.format(root=self.root))
            (keys / name).chmod(0o600)
        names = "".join(f"{self.address(name)} {name}\n" for name in self.names)
        (self.root / "hosts").write_text(f"127.0.0.1 localhost\n{names}")
        (self.root / "first.sh").write_text(FIRST_PROCESS)


def _enter(namespace: int) -> None:
    if ctypes.CDLL(None, use_errno=True).setns(namespace, CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), "setns")


def _do(*words: str) -> None:
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(words)}: {done.stderr.strip()}"


def _wait(condition, what: str, seconds: float = 15.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds:g} s for {what}"
        time.sleep(0.05)
