"""How long ranks take to load a checkpoint, and how many bytes each of them reads: the same layout, other numbers of ranks.

    python benchmarks/resuming.py
    python benchmarks/resuming.py --layers 1 --rounds 1      # a small one

Two ranks save a checkpoint of ZeRO stages 2 and 3. Then ranks whose page cache has nothing of it resume (`Checkpoints.resume`:
hashing, loading, agreeing). "read" is what read() returned to a rank (/proc/PID/io), "mapped" the pages of the checkpoint that
it touched in memory; both as parts of the checkpoint, of the rank with most. Reading what the same rank has hashed before
costs no further transfer from a disk or a file server.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import tempfile
import time
from itertools import product
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]

SAVING_RANKS = 2


def bytes_read() -> int:
    """Return what read() and the like have returned to this process."""
    return int(re.findall(r"rchar: (\d+)", Path("/proc/self/io").read_text())[0])


def mapped_bytes(folder: Path) -> int:
    """Return the memory of this process that is pages of files in `folder`."""
    size, counts = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            counts = str(folder) in line
        elif counts and line.startswith("Rss:"):
            size += 1024 * int(line.split()[1])
    return size


def forget_pages(folder: Path) -> None:
    """Let the kernel drop what it keeps of the files in `folder`, as on a node that has not read them yet."""
    for file in folder.rglob("*"):
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def rank(run_yaml: Path, action: str) -> dict[str, float] | None:
    """Save a checkpoint, or resume from it and measure, as `action` says: what each rank runs. Returns what was measured."""
    import torch
    from support.ranks import start_rank

    from dstune.checkpoint.saves import Saves
    from dstune.checkpoint.session import Checkpoints
    from dstune.config.run_file import read_run
    from dstune.models.load import load_model, load_tokenizer
    from dstune.optim.groups import method_groups
    from dstune.protocols import method_of, optimizer_of
    from dstune.trainer.state import TrainState
    from dstune.zero.ds_config import deepspeed_config
    from dstune.zero.engine import Engine
    from dstune.zero.parts import partitioned_loading
    from dstune.zero.precision import DTYPES, resolve
    from dstune.zero.restore import partitions_of

    world = start_rank()
    config = read_run(run_yaml).config
    precision = resolve(config)
    settings = deepspeed_config(config, world.size, precision, on_gpu=False)
    with partitioned_loading(settings):
        model = load_model(config, load_tokenizer(config.model), (), DTYPES[precision])
    module = method_of(config.method).apply(model, config)
    engine = Engine(module, optimizer_of(config.optimizer), settings, world, groups=method_groups(config, module))
    facts = {"world_size": world.size, "zero_stage": engine.stage, "weight_parts": 1, "shard_settings": {}}
    arguments = (config, run_yaml.parent, engine, world, facts, print)
    if action == "save":
        inner = engine._engine.optimizer.optimizer
        for partition in partitions_of(engine._engine, engine.stage, world.rank):  # as after a step of AdamW
            moments = {kind: torch.rand_like(partition.key) for kind in ("exp_avg", "exp_avg_sq")}
            inner.state[partition.key] = {"step": torch.tensor(2.0), **moments}
        saves = Saves(*arguments)
        assert saves.save(TrainState(step=2), now=True), saves.refusal
        return None
    mapped, read_by_measuring = [0], [0]
    checkpoints = run_yaml.parent / "checkpoints"
    if world.is_main:
        forget_pages(checkpoints)
    restore = engine.restore

    def restore_and_measure(source: Any) -> None:
        restore(source)
        bytes_before = bytes_read()
        mapped[0] = mapped_bytes(checkpoints)
        read_by_measuring[0] = bytes_read() - bytes_before

    engine.restore = restore_and_measure  # type: ignore[method-assign]
    world.barrier()
    read, began = bytes_read(), time.monotonic()
    Checkpoints(*arguments).resume()
    seconds, read = time.monotonic() - began, bytes_read() - read - read_by_measuring[0]
    return {"seconds": seconds, "read": read, "mapped": mapped[0]}


def main() -> None:
    from support.ranks import run_ranks
    from support.tiny import save_decoder, write_dialogues

    from dstune.config.compose import compose
    from dstune.config.run_file import write_run

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--stages", nargs="+", default=["stage2", "stage3"])
    parser.add_argument("--ranks", nargs="+", type=int, default=[2, 1, 4])
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="resuming-", dir=ROOT.parent) as name:
        folder = Path(name)
        os.environ["DSTUNE_CACHE"] = str(folder / "cache")
        shape = {"hidden_size": 768, "intermediate_size": 2432, "num_hidden_layers": arguments.layers}
        model = save_decoder(folder / "model", num_attention_heads=12, num_key_value_heads=12, **shape)
        data = write_dialogues(folder / "dialogues.jsonl", 20)
        print("| ZeRO | ranks | seconds | read | mapped |\n| --- | --- | --- | --- | --- |")
        for stage, ranks in product(arguments.stages, arguments.ranks):
            run = folder / stage
            if not run.exists():
                run.mkdir()
                words = [
                    f"model.path={model}",
                    f"data.train={data}",
                    f"zero={stage}",
                    f"run.dir={run}",
                ]
                write_run(run / "run.yaml", compose([*words, "trainer.precision=bf16"]))
                run_ranks(Path(__file__), SAVING_RANKS, ["save", str(run / "run.yaml")])
            size = sum(file.stat().st_size for file in (run / "checkpoints").rglob("*") if file.is_file())
            rounds = []
            for _ in range(arguments.rounds):
                outputs = run_ranks(Path(__file__), ranks, ["resume", str(run / "run.yaml")])
                rounds.append([json.loads(output.splitlines()[-1]) for output in outputs])
            fastest = min(rounds, key=lambda figures: max(figure["seconds"] for figure in figures))
            most = {key: max(figure[key] for figure in fastest) for key in ("seconds", "read", "mapped")}
            print(
                f"| {stage} | {SAVING_RANKS} -> {ranks} | {most['seconds']:.2f} | {most['read'] / size:.2f} "
                f"| {most['mapped'] / size:.2f} |  ({size / 1e9:.2f} GB)",
                flush=True,
            )


if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1].startswith("["):
        from support.ranks import end_with

        action, path = json.loads(sys.argv[1])
        end_with(lambda: print(json.dumps(rank(Path(path), action))))
    else:
        main()
