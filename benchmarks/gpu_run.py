"""One run of a case: `python gpu_run.py RUN_DIR [--simulate | --cpu] KEY=VALUE ...`, a single rank in this process.

`WAITS=FILE` in the environment: how often each line of a step makes the host wait for the device, beside the untimed first steps
(`torch.cuda.set_sync_debug_mode`, which says nothing of `torch.cuda.synchronize`: that is counted by its caller).
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


def count_waits(file: Path, *, simulate: bool) -> None:
    from dstune.trainer import loop

    counted: Counter[str] = Counter()
    train_step, steps = loop.train_step, 0
    watched = simulated_waits if simulate else cuda_waits

    def counted_step(run: Any, step: Any) -> None:
        nonlocal steps
        if not step.timed:
            train_step(run, step)
            return
        steps += 1
        with watched(counted):
            train_step(run, step)
        file.write_text(json.dumps({place: count / steps for place, count in counted.items()}))

    loop.train_step = counted_step


@contextmanager
def simulated_waits(counted: Counter[str]) -> Iterator[None]:
    from tests.placement import simulated_device

    simulated_device.forget()
    yield
    for (operation, place), count in simulated_device.waits.items():
        counted[f"{place} {operation}"] += count


@contextmanager
def cuda_waits(counted: Counter[str]) -> Iterator[None]:
    import torch

    def show(message: Any, category: Any, filename: str, lineno: int, *unused: Any) -> None:
        if "synchroniz" in str(message):
            counted[f"{filename.rpartition('site-packages/')[2]}:{lineno}"] += 1

    synchronize = torch.cuda.synchronize

    def counted_synchronize(device: Any = None) -> None:
        frame = sys._getframe(1)
        while "accelerator" in frame.f_code.co_filename and frame.f_back is not None:
            frame = frame.f_back
        counted[f"{frame.f_code.co_filename.rpartition('site-packages/')[2]}:{frame.f_lineno} synchronize"] += 1
        synchronize(device)

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = show
        torch.cuda.set_sync_debug_mode("warn")
        torch.cuda.synchronize = counted_synchronize
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")
            torch.cuda.synchronize = synchronize


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
        count_waits(Path(file), simulate="--simulate" in sys.argv)
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
