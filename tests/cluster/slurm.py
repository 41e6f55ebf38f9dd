"""SLURM's real daemons on the machines of `machines.py`: slurmctld on `head`, a slurmd on each node with two GPUs that
are none (devices like /dev/null), and two more on `head` (`TWINS`). No systemd, no cgroups, no accounting.

Needs Debian's slurmctld, slurmd, slurm-client, munge.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

from cluster.machines import Machines

PROGRAMS = {"slurmctld": "slurmctld", "slurmd": "slurmd", "sbatch": "slurm-client", "munged": "munge"}
TWINS = ("twin1", "twin2")
"""Two nodes of SLURM on one host, which see each other's processes, in the partition `twins`."""
CONFIGURATION = """\
ClusterName=cluster
SlurmctldHost=head(10.77.0.100)
SlurmctldPort=17000
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={munge}/socket,cred_expire=5
CredType=cred/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SwitchType=switch/none
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
GresTypes=gpu
MailProg=/bin/true
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool.%n
SlurmctldPidFile={root}/run/slurmctld.pid
SlurmdPidFile={root}/run/slurmd.%n.pid
SlurmctldLogFile={root}/log/slurmctld.log
SlurmdLogFile={root}/log/slurmd.%n.log
SlurmctldDebug=info
SlurmdDebug=info
ReturnToService=2
SlurmdTimeout=25
SlurmctldTimeout=10
KillWait=15
InactiveLimit=0
MinJobAge=300
JobRequeue=1
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2,bf_window=60
"""


def missing() -> str | None:
    """Why SLURM cannot run here, or None."""
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    absent = [package for program, package in PROGRAMS.items() if shutil.which(program, path=path) is None]
    return f"not installed (Debian: apt-get install {' '.join(absent)})" if absent else None


class Slurm:
    """A context manager; `machines` are there already.

    A ping of a dead node lasts up to 10 s (`MessageTimeout`), and no node is pinged meanwhile: with a `SlurmdTimeout` of 10 s
    the living ones were set down too, once in a while.
    """

    def __init__(self, root: Path, machines: Machines):
        self.root, self.machines = root, machines
        self.nodes = [name for name in machines.names if name != "head"]
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        # Its socket must be in reach of everybody, and its path short.
        self._munge = Path(tempfile.mkdtemp(prefix="munge-"))
        self._munge.chmod(0o755)
        self.env = {"SLURM_CONF": str(root / "etc" / "slurm.conf")}

    def __enter__(self) -> Slurm:
        try:
            self._write_files()
            self._start_munge()
            self._daemon("slurmctld", "head", "slurmctld", "-D", "-f", self.env["SLURM_CONF"])
            for name in (*self.nodes, *TWINS):
                self.start_node(name)
            self.wait_until_ready()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        if "slurmctld" in self._daemons and self.machines.is_up("head"):
            self.call("scancel", "--user=root")
            deadline = time.monotonic() + 8
            while self.call("squeue", "-h").strip() and time.monotonic() < deadline:
                time.sleep(0.2)
        for daemon in reversed(list(self._daemons.values())):
            _end(daemon)
        shutil.rmtree(self._munge)

    def start_node(self, name: str) -> None:
        """Start a node's daemon, again after its machine was killed."""
        (self.root / f"spool.{name}").mkdir(exist_ok=True)
        self._daemon(name, "head" if name in TWINS else name, "slurmd", "-D", "-f", self.env["SLURM_CONF"], "-N", name)

    def call(self, *words: str) -> str:
        """The output of one of SLURM's commands on the head."""
        return self.machines.on("head", "env", f"SLURM_CONF={self.env['SLURM_CONF']}", *words).stdout

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + 30
        while True:
            states = dict(line.split() for line in self.call("sinfo", "-h", "-N", "-o", "%N %t").splitlines())
            if all(states.get(name) in ("idle", "alloc", "mix", "comp") for name in (*self.nodes, *TWINS)):
                return
            assert time.monotonic() < deadline, f"SLURM is not ready: {states}; see {self.root}/log"
            time.sleep(0.1)

    def _daemon(self, key: str, machine: str, *words: str) -> None:
        program = shutil.which(words[0], path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
        assert program is not None
        self._daemons[key] = subprocess.Popen(
            self.machines.command(machine, [program, *words[1:]], Path("/")),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def _start_munge(self) -> None:
        folder = self._munge
        (folder / "key").write_bytes(os.urandom(1024))
        (folder / "key").chmod(0o400)
        files = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        options = [f"--{option}={folder / name}" for option, name in files.items()]
        # Its socket is a file, which all machines share.
        self._daemons["munged"] = subprocess.Popen(
            ["/usr/sbin/munged", "--foreground", "--num-threads=2", *options],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=(folder / "stderr").open("ab"),
            start_new_session=True,
        )
        deadline = time.monotonic() + 10
        while not (folder / "socket").exists():
            assert time.monotonic() < deadline, (folder / "stderr").read_text()
            time.sleep(0.05)

    def _write_files(self) -> None:
        for name in ("etc", "log", "run", "state", "dev"):
            (self.root / name).mkdir(parents=True)
        for number in (0, 1):
            os.mknod(self.root / "dev" / f"nvidia{number}", 0o20666, os.makedev(1, 3))
        lines = [CONFIGURATION.format(root=self.root, munge=self._munge)]
        shape = "CPUs=4 Boards=1 SocketsPerBoard=1 CoresPerSocket=4 ThreadsPerCore=1 RealMemory=4000 Gres=gpu:2"
        hosts = {name: name for name in self.nodes} | dict.fromkeys(TWINS, "head")
        for port, (name, host) in enumerate(hosts.items(), start=17001):
            address = f"NodeHostname={host} NodeAddr={self.machines.address(host)} Port={port}"
            lines.append(f"NodeName={name} {address} {shape} State=UNKNOWN\n")
        for name, nodes in {"debug": self.nodes, "twins": TWINS}.items():
            default = "YES" if name == "debug" else "NO"
            lines.append(f"PartitionName={name} Nodes={','.join(nodes)} Default={default} MaxTime=INFINITE State=UP\n")
        devices = f"AutoDetect=off\nNodeName={','.join(hosts)} Name=gpu File={self.root}/dev/nvidia[0-1]\n"
        files = {"slurm.conf": "".join(lines), "cgroup.conf": "CgroupPlugin=disabled\n", "gres.conf": devices}
        for name, text in files.items():
            (self.root / "etc" / name).write_text(text)


def _end(daemon: subprocess.Popen[bytes]) -> None:
    if daemon.poll() is None:
        # Started through nsenter, which waits for the daemon itself.
        children = Path(f"/proc/{daemon.pid}/task/{daemon.pid}/children").read_text().split()
        for pid in [*map(int, children), daemon.pid]:
            try:
                os.kill(pid, signal.SIGTERM)
            except ProcessLookupError:
                continue
        try:
            daemon.wait(5)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait()
