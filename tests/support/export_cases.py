"""Program of the export tests, on every rank: trains each case, and keeps the whole weights of each saved step."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from dstune.config.run_file import read_run
from dstune.rank import worker
from dstune.zero.engine import Engine
from dstune.zero.parts import gathered
from dstune.zero.shard_files import Save
from support.ranks import end_with, start_rank

save_shards = Engine.save


def save_and_gather(engine: Engine, directory: Path, tag: str, *, background: bool = False) -> Save:
    save = save_shards(engine, directory, tag, background=background)
    with gathered(list(engine.module.parameters())):
        whole = {name: parameter.detach().clone() for name, parameter in engine.module.named_parameters()}
    if torch.distributed.get_rank() == 0:
        torch.save(whole, directory.parent / f"whole-{tag.removesuffix('.incomplete')}.pt")
    return save


def main() -> None:
    world = start_rank()
    Engine.save = save_and_gather  # type: ignore[method-assign]
    for run_dir in json.loads(sys.argv[1]):
        worker.train(read_run(Path(run_dir) / "run.yaml").config, Path(run_dir), world)


if __name__ == "__main__":
    end_with(main)
