"""Program on every rank: trains each run directory; prints what DeepSpeed's engine was really given, on rank 0."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from support.ranks import end_with, start_rank

from dstune.config.run_file import read_run
from dstune.rank import worker
from dstune.zero.engine import Engine

start_engine = Engine.__init__


def main() -> None:
    world = start_rank()

    def tell(engine: Engine, *arguments: object, **options: object) -> None:
        start_engine(engine, *arguments, **options)
        inner = engine._engine
        zero = json.loads(inner._config.zero_config.model_dump_json())
        facts = {"clip": inner.gradient_clipping(), "batch": inner.train_batch_size(), "zero": zero}
        optimizer = inner.optimizer
        facts["buckets"] = [
            getattr(optimizer, name, None) for name in ("reduce_bucket_size", "allgather_bucket_size", "sub_group_size")
        ]
        if world.is_main:
            print("ENGINE " + json.dumps(facts), flush=True)

    Engine.__init__ = tell  # type: ignore[method-assign]
    for run_dir in json.loads(sys.argv[1]):
        worker.train(read_run(Path(run_dir) / "run.yaml").config, Path(run_dir), world)


if __name__ == "__main__":
    end_with(main)
