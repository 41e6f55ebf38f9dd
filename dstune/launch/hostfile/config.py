"""Keys of launch=hostfile."""

from __future__ import annotations

from dataclasses import dataclass

from dstune.launch.agents.config import AgentsConfig
from dstune.launch.on_hosts_config import OnHostsConfig


@dataclass(frozen=True)
class HostfileConfig(AgentsConfig, OnHostsConfig):
    """Ranks on the hosts of a file, started over ssh by an agent on each of them."""

    name: str = "hostfile"
