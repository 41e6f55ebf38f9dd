"""Run cases of `dstune_verify` on the ranks of a launcher: each rank runs `python -m dstune.rank.verify DIR`.

`dstune verify FILE.yaml` verifies the settings of a run, `dstune doctor` the short form.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from dstune.config.run_file import read_run
from dstune.config.schema import Precision, RunConfig
from dstune.core import rendezvous
from dstune.core.rank_env import STORE, RankEnv
from dstune.rank import process
from dstune.zero import accelerator
from dstune.zero.ds_config import deepspeed_config
from dstune.zero.precision import resolve
from dstune_verify.command import exit_code, judge, list_cases
from dstune_verify.options import Options
from dstune_verify.world import Place


def run(directory: Path, env: RankEnv) -> None:
    """Run the cases of `verify.json`; rank 0 writes the verdict into `result.json`."""
    config = read_run(directory / "run.yaml", []).config
    request = json.loads((directory / "verify.json").read_text())
    rendezvous.meet(env, directory, os.environ)
    options = Options()
    if not request["short"]:
        precision = resolve(config)
        settings = settings_of(config, env.world_size, precision)
        options = Options(settings, request["network"], request["lora"], precision.value)
    cases = [case for case in list_cases(options).values() if case.short or not request["short"]]
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    place = Place("dstune", env.rank, env.world_size, env.local_rank, address, port)
    verdict = judge(cases, options, place, seconds=request["seconds"], store=os.environ.get(STORE))
    if env.rank == 0:
        content = {"json": verdict.as_json(), "text": verdict.as_text(whole=True), "code": exit_code(verdict.outcomes)}
        (directory / "result.json").write_text(json.dumps({"status": "completed", "verify": content}))


def settings_of(config: RunConfig, ranks: int, precision: Precision) -> dict[str, Any]:
    """Return DeepSpeed's configuration for the run on these ranks."""
    return deepspeed_config(config, ranks, precision, on_gpu=accelerator.present())


if __name__ == "__main__":
    process.main(run)
