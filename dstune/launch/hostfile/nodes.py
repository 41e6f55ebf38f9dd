"""What has to be known of the hosts before DeepSpeed's launcher starts."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
from pathlib import Path

from dstune.config.schema import RunConfig
from dstune.core.errors import Problem, UserError
from dstune.launch.console import Console
from dstune.launch.hostfile.commands import pdsh_plan
from dstune.launch.on_hosts import OnHosts
from dstune.launch.remote import check_hosts, on_cpu
from dstune.launch.remote_commands import RemotePlan, ssh_of


def plan(launcher: OnHosts, run: RunConfig, run_dir: Path, launch_id: str, console: Console) -> RemotePlan:
    """Look at the hosts, and decide what is started. Raises UserError."""
    launch = launcher.config
    for program in ("pdsh", "ssh"):
        if shutil.which(program) is None:
            fix = f"install it (Debian: apt-get install {'pdsh' if program == 'pdsh' else 'openssh-client'})"
            raise UserError(Problem("launch=hostfile", f"there is no {program} on this machine", fix))
    slots = launcher.slots()
    answers = check_hosts(list(slots), ssh_of(launch), run_dir, launch.interface, console)
    facts = answers[0].facts
    assert facts is not None
    return pdsh_plan(
        run,
        run_dir,
        slots,
        launch_id=launch_id,
        parent=os.environ,
        address=_address(answers[0].host, facts["interfaces"], launch.interface),
        port=facts["port"],
        on_cpu=on_cpu(answers),
    )


def _address(host: str, interfaces: dict[str, str], interface: str | None) -> str:
    """Where the other nodes reach the first one."""
    if interface:
        return interfaces[interface]
    with contextlib.suppress(OSError):
        address = socket.gethostbyname(host)
        if not address.startswith("127.") and address in interfaces.values():
            return address
    bridges = ("lo", "docker", "virbr", "veth", "br-")
    own = [address for name, address in interfaces.items() if not name.startswith(bridges)]
    return next(iter(own), "127.0.0.1")
