"""Counts the bytes that leave a node in a step at stage 3, without and with a copy of the weights in each node (`zero.hpz`).

    python benchmarks/node_bytes.py             # full fine-tuning and LoRA, beside the plan; about four minutes

Two nodes are network namespaces of this machine (tests/cluster/machines.py) with two ranks each, which train a decoder of 4 million
parameters in fp32 with two micro-batches a step. The interface's counters of a long run minus those of a short one, divided by the
steps between, leave out what a start sends. Needs root.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]

from cluster.machines import Machines, missing  # noqa: E402
from support.tiny import save_decoder, write_dialogues  # noqa: E402

from dstune.config.compose import compose  # noqa: E402
from dstune.planning.hardware import DEVICES, Cluster  # noqa: E402
from dstune.planning.stage import setup_on  # noqa: E402
from dstune.planning.time import communication, sent_for_copies  # noqa: E402

NODES, PER_NODE = 2, 2
SHORT, LONG = 4, 12
MB = 1e6


def overrides(folder: Path, name: str, method: str, steps: int, *, hpz: bool) -> list[str]:
    return [
        f"model.path={folder / 'model'}",
        f"data.train={folder / 'dialogues.jsonl'}",
        "data=files",
        "data.max_length=64",
        "data.packing=false",
        "optimizer=sgd",
        "trainer.precision=fp32",
        "trainer.micro_batch_size=1",
        "trainer.global_batch_size=8",
        f"trainer.max_steps={steps}",
        "evaluate.every=0",
        "evaluate.at_start=false",
        "checkpoint.every=0",
        "run.export=none",
        f"method={method}",
        "zero=stage3",
        "zero.param_persistence_threshold=0",
        f"zero.hpz={str(hpz).lower()}",
        f"run.dir={folder / name}",
    ]


def sent(machines: Machines, node: str) -> int:
    """Return the bytes that have left a node."""
    shown = machines.on(node, "ip", "-s", "-j", "link", "show", "eth0")
    return int(json.loads(shown.stdout)[0]["stats64"]["tx"]["bytes"])


def train(machines: Machines, folder: Path, words: list[str], port: int) -> int:
    """Train on all ranks; return the bytes that left the first node."""
    before = sent(machines, "node1")
    processes = []
    for rank in range(NODES * PER_NODE):
        node = f"node{1 + rank // PER_NODE}"
        variables = {
            "RANK": rank,
            "WORLD_SIZE": NODES * PER_NODE,
            "LOCAL_RANK": rank % PER_NODE,
            "LOCAL_WORLD_SIZE": PER_NODE,
            "MASTER_ADDR": machines.address("node1"),
            "MASTER_PORT": port,
            "GLOO_SOCKET_IFNAME": "eth0",
            "OMP_NUM_THREADS": 1,
            "WANDB_MODE": "disabled",
            "HF_HUB_OFFLINE": 1,
            "DSTUNE_CACHE": folder / "cache",
            "PYTHONPATH": ROOT,
        }
        command = ["env", *(f"{key}={value}" for key, value in variables.items())]
        command += [sys.executable, "-m", "dstune", "train", *words]
        with (folder / f"rank-{rank}.log").open("wb") as log:
            processes.append(
                subprocess.Popen(machines.command(node, command, folder), stdout=log, stderr=subprocess.STDOUT)
            )
    codes = [process.wait() for process in processes]
    if any(codes):
        raise SystemExit(f"ranks ended with {codes}:\n{(folder / 'rank-0.log').read_text()[-3000:]}")
    return sent(machines, "node1") - before


def planned(words: list[str]) -> tuple[float, float]:
    """Return the bytes that the plan counts between nodes, and those of a rank within its node."""
    cluster = Cluster(DEVICES["CPU"], PER_NODE, NODES)
    setup, _, _ = setup_on(compose(words).config, cluster)
    return communication(setup), sent_for_copies(setup)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=["full", "lora"])
    arguments = parser.parse_args()
    if reason := missing():
        raise SystemExit(f"no nodes can be made here: {reason}")
    os.environ["HF_HUB_OFFLINE"] = "1"
    port = 29600
    print("| method | zero.hpz | left a node, MB a step | planned between nodes | planned in a node, each rank |")
    print("| --- | --- | ---: | ---: | ---: |")
    with tempfile.TemporaryDirectory() as name, Machines(Path(name) / "machines", NODES) as machines:
        folder = Path(name)
        save_decoder(folder / "model", hidden_size=256, intermediate_size=768, num_hidden_layers=5)
        write_dialogues(folder / "dialogues.jsonl", 120)
        for method in arguments.methods:
            for hpz in (False, True):
                counted = {}
                for steps in (SHORT, LONG):
                    words = overrides(folder, f"{method}-{hpz}-{steps}", method, steps, hpz=hpz)
                    counted[steps] = train(machines, folder, words, port := port + 1)
                measured = (counted[LONG] - counted[SHORT]) / (LONG - SHORT)
                between, inside = planned(words)
                figures = " | ".join(f"{size / MB:.1f}" for size in (measured, between, inside))
                print(f"| `{method}` | {str(hpz).lower()} | {figures} |", flush=True)


if __name__ == "__main__":
    main()
