"""`dstune verify`: whether the stack that is installed here, or the settings of one configuration, computes the right gradients.

The cases are in the package `dstune_verify`, which needs nothing of dstune. With a configuration, the ranks are started by its
launcher, as for a run, and DeepSpeed gets the settings that the run would have.
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from dstune.config.compose import compose
from dstune.config.flags import hydra_flags
from dstune.config.run_file import Composed, write_run
from dstune.config.schema import RunConfig
from dstune.core.arguments import VerbParser, is_configuration_file
from dstune.core.errors import EXIT_FAILED, Problem, UserError
from dstune.core.paths import certificates_folder
from dstune.launch import records
from dstune.launch.console import Console
from dstune.launch.plan import refuse
from dstune.planning.source import whole_config_json
from dstune.protocols import launcher_of, method_of
from dstune.protocols.launcher import LaunchRequest

REQUEST = "verify.json"


def main(argv: list[str]) -> int:
    """Run the verb; return the exit code of `dstune_verify.command`. Raises UserError."""
    if not any(is_configuration_file(word) or ("=" in word and not word.startswith("-")) for word in argv):
        from dstune_verify.command import main as verify

        return verify(argv, certificates_folder())
    arguments = _parser().parse_intermixed_args(argv)
    flags = hydra_flags(arguments.overrides)
    config = compose(["data.train=none", *flags.overrides], flags.config_dirs).config
    refuse(config)
    return verify_run(config, as_json=arguments.json, seconds=arguments.time_limit or 0)


def _parser() -> VerbParser:
    text = "Whether the settings of a configuration give the right gradients. `dstune verify --help` has the form without one."
    parser = VerbParser(prog="dstune verify", description=text)
    parser.add_argument("overrides", nargs="+", metavar="FILE.yaml or KEY=VALUE")
    parser.add_argument("--time-limit", type=float, metavar="SECONDS", help="limit of a case")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def verify_run(config: RunConfig, *, as_json: bool, seconds: float) -> int:
    """Verify the settings of `config` on the ranks that its launcher starts, print the verdict, and return the exit code.

    Raises UserError if its launcher cannot start ranks from here.
    """
    launch = launcher_of(config.launch).to_measure()
    if launch is None:
        raise UserError(Problem("launch", "it cannot start ranks from here", "dstune doctor says what is missing"))
    code, verdict = judge_on_ranks(replace(config, launch=launch), request_of(config, seconds))
    if verdict is None:
        return code or EXIT_FAILED
    print(json.dumps(verdict["json"]) if as_json else verdict["text"])
    return int(verdict["code"])


def judge_on_ranks(config: RunConfig, request: dict[str, Any]) -> tuple[int, dict[str, Any] | None]:
    """Start ranks by the launcher of `config`, which is one `to_measure`, and let them run cases.

    request: what `dstune.rank.verify` reads. Returns the launcher's exit code and the verdict (`json`, `text`, `code`), None if the
    ranks did not get as far.
    """
    launcher = launcher_of(config.launch)
    # Several nodes need a folder that all of them see, which the working directory is.
    parent = Path.cwd() if launcher.shared_folder else None
    with tempfile.TemporaryDirectory(prefix=".dstune-verify-", dir=parent) as scratch:
        folder = Path(scratch)
        (folder / "logs").mkdir()
        write_run(folder / "run.yaml", Composed(config, []))
        (folder / REQUEST).write_text(json.dumps(request))
        console = Console(sys.stderr)
        command = ("dstune.rank.verify", str(folder))
        code = launcher.start(LaunchRequest(config, folder, console, command=command, saves=False))
        return code, (records.read_result(folder) or {}).get("verify")


def request_of(config: RunConfig, seconds: float) -> dict[str, Any]:
    """Return what the ranks are to verify of `config`, apart from DeepSpeed's settings, which depend on their devices."""
    network = whole_config_json(config.model) or {}
    is_decoder = any("CausalLM" in name or "LMHead" in name for name in network.get("architectures") or ())
    return {
        "network": network if is_decoder else None,
        "lora": method_of(config.method).adapter,
        "seconds": seconds,
        "short": False,
    }
