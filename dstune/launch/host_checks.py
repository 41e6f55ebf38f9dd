"""The checks of `dstune doctor` on the hosts of a hostfile."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from dstune.core.errors import UserError
from dstune.launch import hosts, node_health
from dstune.launch.host_slots import read_hostfile, select_slots
from dstune.launch.on_hosts_config import OnHostsConfig
from dstune.launch.remote_commands import ssh_of
from dstune.protocols.launcher import FAIL, PASS, WARN, Check


def host_checks(launch: OnHostsConfig) -> Iterator[Check]:
    """Yield for each host whether it is reachable, with the same versions and files and a synchronised clock."""
    assert launch.hostfile is not None
    try:
        names = list(select_slots(read_hostfile(launch.hostfile), launch.include, launch.exclude))
    except UserError as error:
        for problem in error.problems:
            yield Check("hostfile", FAIL, f"{problem.value}: {problem.reason}", problem.fix)
        return
    ssh, paths = ssh_of(launch), [hosts.package_folder()]
    answers = hosts.ask(names, ssh, paths, [str(Path.cwd())])
    problems = hosts.compare(answers, paths)
    reached = [answer.host for answer in answers if answer.facts is not None]
    problems += hosts.check_shared_folder(reached, ssh, Path.cwd()) if reached else []
    for answer in answers:
        host_problems = [problem for problem in problems if problem.value == answer.host]
        for problem in host_problems:
            yield Check(f"host {answer.host}", FAIL, problem.reason, problem.fix)
        if host_problems or answer.facts is None:
            continue
        findings = node_health.judge(answer.facts["health"], several_nodes=True)
        for check in findings:
            if check.status != PASS:
                yield replace(check, name=f"host {answer.host}", detail=f"{check.name}: {check.detail}")
        skew = hosts.common_skew([answer]).get(answer.host)
        if skew is not None:
            yield Check(
                f"host {answer.host}", WARN, f"its clock is off by {skew:+.1f} s", "synchronise the clocks (chrony)"
            )
            continue
        links = ", ".join(f"{name} {address}" for name, address in answer.facts["interfaces"].items() if name != "lo")
        detail = (
            f"same versions and files, {answer.facts['gpus']} GPU(s), {answer.facts['memory_gib']:.0f} GiB, {links}"
        )
        yield Check(f"host {answer.host}", PASS, detail)
