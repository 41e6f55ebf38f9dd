"""Keys of launch=hostfile."""

from __future__ import annotations

from dataclasses import dataclass

from dstune.launch.on_hosts_config import OnHostsConfig


@dataclass(frozen=True)
class HostfileConfig(OnHostsConfig):
    """Ranks on the hosts of a file, started by DeepSpeed's launcher over pdsh and ssh."""

    name: str = "hostfile"
