"""`dstune doctor`: what this machine, the hosts of a hostfile or a cluster can run, and what is missing."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import textwrap
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from dstune.config.compose import compose
from dstune.config.launch_rules import check_launch
from dstune.config.run_file import Composed, write_run
from dstune.config.schema import RunConfig
from dstune.core.arguments import VerbParser
from dstune.core.errors import EXIT_DONE, EXIT_FAILED, DstuneError, UserError, first_line
from dstune.launch import checks, records
from dstune.launch.console import Console
from dstune.launch.verify import judge_on_ranks
from dstune.planning.hardware import known_device
from dstune.protocols import launcher_of
from dstune.protocols.launcher import FAIL, PASS, SKIP, WARN, Check, LaunchRequest
from dstune.protocols.launcher_options import ChecksMachines

AVOIDED = (
    "clipping-default", "reentrant-repeated", "reentrant-repeated-error", "uneven-experts", "uneven-experts-abort",
)  # fmt: skip
"""Faults of DeepSpeed that runs of dstune avoid: it always writes `gradient_clipping`, recomputes without reentrant autograd, and
reduces the same gradients on all ranks."""
ENOUGH = 0.8
"""Share of a link's published speed; a link that reaches less than this gets a warning."""


def main(argv: list[str]) -> int:
    """Run `dstune doctor`; return 1 if a check fails. Raises UserError for wrong arguments."""
    arguments = _parse(argv)
    config = compose(["data.train=none", *arguments.overrides]).config
    if problems := list(check_launch(config)):
        raise UserError(problems)
    checks: list[Check] = []
    for check in _checks(config, arguments):
        checks.append(check)
        if not arguments.json:
            print(_line(check), flush=True)
    failed = [check for check in checks if check.status == FAIL]
    if arguments.json:
        print(json.dumps({"ok": not failed, "checks": [asdict(check) for check in checks]}))
    else:
        warned = sum(check.status == WARN for check in checks)
        print(f"\n{len(checks)} checks: {len(failed)} failed, {warned} warning{'s' * (warned != 1)}")
    return EXIT_FAILED if failed else EXIT_DONE


def _parse(argv: list[str]) -> argparse.Namespace:
    text = "What this machine, or the hosts that launch=... names, can run, and what is missing."
    parser = VerbParser(prog="dstune doctor", description=text)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="launch=hostfile launch.hostfile=hosts, ...")
    help_text = "leave out what ranks measure: the all-reduce and the gradients"
    parser.add_argument("--no-allreduce", action="store_true", help=help_text)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser.parse_intermixed_args(argv)


def _checks(config: RunConfig, arguments: argparse.Namespace) -> Iterator[Check]:
    launcher, reachable = launcher_of(config.launch), True
    stages: list[Callable[[], Iterator[Check]]] = [
        checks.software,
        lambda: checks.machine(several_nodes=launcher.shared_folder),
        checks.places,
        lambda: checks.network(hub=True),
        lambda: checks.launchers(needed=config.launch.name),
        checks.trackers,
        checks.data_sources,
    ]
    for stage in stages:
        yield from stage()
    for check in launcher.checks() if isinstance(launcher, ChecksMachines) else ():
        reachable &= check.status != FAIL
        yield check
    if arguments.no_allreduce:
        return
    launch = launcher.to_measure() if reachable else None
    if launch is None:
        yield Check("all-reduce", SKIP, "not measured: fix the problems above first")
        yield Check("gradients", SKIP, "not compared: fix the problems above first")
    else:
        yield measure_allreduce(replace(config, launch=launch))
        yield verify_gradients(replace(config, launch=launch))


def measure_allreduce(config: RunConfig) -> Check:
    """Measure bus bandwidth and latency between all ranks, started as a run would start them."""
    launcher = launcher_of(config.launch)
    console = Console(sys.stderr)
    # Several nodes need a folder that all of them see, which the working directory is.
    parent = Path.cwd() if launcher.shared_folder else None
    with tempfile.TemporaryDirectory(prefix=".dstune-doctor-", dir=parent) as scratch:
        folder = Path(scratch)
        (folder / "logs").mkdir()
        try:
            write_run(folder / "run.yaml", Composed(config, []))
            command = ("dstune.rank.doctor", str(folder))
            code = launcher.start(LaunchRequest(config, folder, console, command=command, saves=False))
        except DstuneError as error:
            return Check("all-reduce", FAIL, first_line(error), "fix this first")
        result = records.read_result(folder) or {}
    if code != EXIT_DONE or "allreduce" not in result:
        reason = str(result.get("reason") or f"the ranks ended with exit code {code}")
        return Check("all-reduce", FAIL, reason, "see the lines above")
    return judge(result["allreduce"])


def verify_gradients(config: RunConfig) -> Check:
    """Run the short form of `dstune verify` between all ranks, started as a run would start them."""
    try:
        code, verdict = judge_on_ranks(config, {"short": True, "seconds": 0})
    except DstuneError as error:
        return Check("gradients", FAIL, first_line(error), "fix this first")
    if verdict is None:
        return Check("gradients", FAIL, f"the ranks ended with exit code {code}", "see the lines above")
    return judge_gradients(verdict["json"]["cases"])


def judge_gradients(cases: Sequence[Mapping[str, Any]]) -> Check:
    """Return whether runs compute the right gradients. cases: of the verdict of `dstune_verify`."""
    avoided = [case for case in cases if case["known"] and case["known"]["name"] in AVOIDED]
    others = [case for case in cases if case not in avoided]
    counts = Counter(case["status"] for case in others)
    detail = ", ".join(f"{count} {status}" for status, count in counts.items())
    if avoided:
        detail += f"; {len(avoided)} known faults of DeepSpeed show, which runs avoid"
    if wrong := [case for case in others if case["status"] == "wrong"]:
        reasons = "; ".join(f"{case['case']}: {case['detail']}" for case in wrong)
        remedies = ", ".join(dict.fromkeys(case["known"]["remedy"] for case in wrong if case["known"]))
        return Check("gradients", FAIL, f"{detail}. {reasons}", remedies or "`dstune verify` shows more")
    if failed := [case for case in others if case["status"] == "crashed"]:
        reasons = "; ".join(f"{case['case']}: {case['detail']}" for case in failed)
        return Check("gradients", WARN, f"{detail}. {reasons}", "`dstune verify` shows more")
    return Check("gradients", PASS, detail)


def judge(measured: dict) -> Check:
    """Compare the measured figures with the published speed of the link. measured: the result of `dstune.rank.doctor`."""
    ranks, hosts = measured["ranks"], len(measured["hosts"])
    latency = f"latency {measured['latency_seconds'] * 1e6:,.0f} us (4 KiB)"
    best = max((row["bus_gb_per_second"] or 0.0 for row in measured["sizes"]), default=0.0)
    where = f"{ranks} rank{'s' * (ranks > 1)} on {hosts} host{'s' * (hosts > 1)}"
    if measured["wrong"]:
        fix = "`dstune verify --cases collective` shows which collectives are wrong; NCCL_ALGO, NCCL_PROTO and drivers choose how"
        return Check("all-reduce", FAIL, f"{where}: wrong sums: {'; '.join(measured['wrong'][:3])}", fix)
    if ranks == 1:
        return Check("all-reduce", PASS, f"{where}: {latency}; nothing to measure between ranks")
    detail = f"{where}: bus bandwidth {best:.2f} GB/s, {latency}"
    if measured.get("nccl_over_sockets"):
        fix = "check the fabric's driver (ibv_devinfo) and launch.interface; NCCL_DEBUG=INFO shows what NCCL tries"
        return Check("all-reduce", WARN, f"{detail}; NCCL uses TCP sockets, not the fast fabric", fix)
    device = known_device(measured["device"])
    if device is None or hosts > 1:  # between nodes the network decides, and its speed is not known
        return Check("all-reduce", PASS, detail)
    link = device.link
    if best < ENOUGH * link:
        fix = "nvidia-smi topo -m shows how the GPUs are connected; NCCL_DEBUG=INFO shows which links NCCL uses"
        return Check("all-reduce", WARN, f"{detail}; the link of a {measured['device']} has {link:g} GB/s", fix)
    return Check("all-reduce", PASS, f"{detail} of {link:g} GB/s")


def _line(check: Check) -> str:
    mark = {PASS: "pass", WARN: "WARN", FAIL: "FAIL", SKIP: " -- "}[check.status]
    head = f"{mark}  {check.name:<18} "
    lines = textwrap.wrap(check.detail, 100) or [""]
    further_lines = [f"{'':<{len(head)}}{line}" for line in lines[1:]]
    fix = [f"{'':<{len(head)}}fix: {check.fix}"] if check.fix and check.status != PASS else []
    return "\n".join([head + lines[0], *further_lines, *fix])
