"""One run of a case: `python gpu_run.py RUN_DIR [--simulate | --cpu] KEY=VALUE ...`, a single rank in this process.

`WAITS=FILE` in the environment: how often each line of a step makes the host wait for the device, beside the untimed first steps
(`torch.cuda.set_sync_debug_mode`).
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


def count_waits(file: Path) -> None:
    import torch

    from dstune.trainer import loop

    if not torch.cuda.is_available():
        return
    counted: Counter[str] = Counter()
    train_step, steps = loop.train_step, 0

    def show(message: Any, category: Any, filename: str, lineno: int, *unused: Any) -> None:
        if "synchroniz" in str(message):
            counted[f"{filename.rpartition('site-packages/')[2]}:{lineno}"] += 1

    def counted_step(run: Any, step: Any) -> None:
        nonlocal steps
        if not step.timed:
            train_step(run, step)
            return
        steps += 1
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.showwarning = show
            torch.cuda.set_sync_debug_mode("warn")
            try:
                train_step(run, step)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        file.write_text(json.dumps({place: count / steps for place, count in counted.items()}))

    loop.train_step = counted_step


def main() -> None:
    folder = Path(sys.argv[1])
    words = [word for word in sys.argv[2:] if word not in ("--simulate", "--cpu")]
    if "--simulate" in sys.argv:
        from benchmarks.gpu_bench import install_simulated_device

        install_simulated_device()
    from dstune.config.compose import compose
    from dstune.config.run_file import Composed, write_run
    from dstune.config.validate import validate
    from dstune.core.rank_env import RankEnv
    from dstune.rank import worker
    from dstune.zero.start import start_process_group

    if file := os.environ.get("WAITS"):
        count_waits(Path(file))
    config = compose([f"run.dir={folder}", *words]).config
    validate(config)
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    write_run(folder / "run.yaml", Composed(config, []))
    store = Path(tempfile.mkdtemp()) / "store"
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0", DSTUNE_STORE=str(store))
    worker.train(config, folder, start_process_group(RankEnv(0, 1, 0, 1, "environment")))
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
