"""What the measures of docs/security.md cost: a local launch in seconds, a step in microseconds, each part on its own.

`python benchmarks/launch_cost.py` starts two ranks on this machine (gloo) and prints a table; medians of several rounds.
The parts of a start add up: a start as a whole differs from one to the next by more than all of them together.

`--beside TREE [--rounds 6]` starts whole runs of this tree and of another one (an earlier commit, checked out) at the same
moment, each on half of the processors, which they swap every round: seconds from the command to the end of the first step, and
seconds of a step. What the two differ in is all that changed between them.

`--warm [--rounds 5]` compares cold starts with forks of a process that has done the imports (`launch.warm`), by turns: a first
start, a later one (a sweep's second trial, a job of the fine-tuning API), and the restart of a run whose rank was killed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil

TREE = Path(__file__).resolve().parents[1]
ROUNDS = 7
STEPS = 200


def seconds(action: Callable[[], object], times: int = 1) -> float:
    began = time.perf_counter()
    for _ in range(times):
        action()
    return (time.perf_counter() - began) / times


def median(measure: Callable[[], float], rounds: int = ROUNDS) -> float:
    return statistics.median(measure() for _ in range(rounds))


def of_signing() -> dict[str, float]:
    """Return seconds of a launch: the key when there is none yet, what is signed, and the look at a stored run."""
    from dstune.config import trust
    from dstune.config.compose import compose
    from dstune.config.run_file import read_run_content, write_run
    from dstune.core import signing

    seconds_by_step: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:

        def first_key() -> float:
            os.environ["XDG_CONFIG_HOME"] = tempfile.mkdtemp(dir=folder)
            return seconds(lambda: signing.sign({}))

        seconds_by_step["the first key of a user, once"] = median(first_key)
        run = Path(folder) / "run.yaml"
        words = ["experiment=quickstart", "tracking.mlflow.uri=http://x", "model.trust_remote_code=true"]
        write_run(run, compose(words))
        content = read_run_content(run)
        seconds_by_step["signature of a run"] = median(lambda: seconds(lambda: signing.sign(trust.statement(content))))
        seconds_by_step["look at the signature of a stored run"] = median(
            lambda: seconds(lambda: trust.cleared(content, run))
        )
    return seconds_by_step


def of_tokenizer() -> dict[str, float]:
    """Return seconds that a rank takes to try the patterns of a tokenizer, beside a process that has imported what ranks do."""
    import torch  # noqa: F401 (a fork has to copy its tables)
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from dstune.core import tokenizers
    from dstune.core.confinement import here

    made = Tokenizer(models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex(r" ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"), "isolated")
    opened = PreTrainedTokenizerFast(tokenizer_object=made)

    def trial() -> float:
        here._verdicts.clear()
        return seconds(lambda: tokenizers._try(opened))

    return {"trial of a tokenizer that has patterns": median(trial)}


def rank(number: int, folder: str, kind: str) -> None:
    """Print what this rank measures, as JSON: one process forms one group."""
    import torch
    import torch.distributed as torch_dist

    from dstune.core import distributed, messages
    from dstune.core.rank_env import GROUP_SECRET

    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    place = f"file://{folder}/store" if kind == "file" else f"tcp://127.0.0.1:{kind}"
    store = seconds(lambda: torch_dist.init_process_group("gloo", init_method=place, rank=number, world_size=2))
    control = torch_dist.new_group(backend="gloo")
    os.environ[GROUP_SECRET] = "0" * 64
    torch_dist.barrier(control)
    proof = median(lambda: seconds(lambda: distributed.prove(control, range(2), number, "control")))
    everyone = [torch.zeros(8, dtype=torch.float64) for _ in range(2)]

    def numbers() -> None:
        torch_dist.all_gather(everyone, torch.zeros(8, dtype=torch.float64), group=control)

    sent = [{"vectors": torch.randn(16, 384), "index": torch.arange(16)} for _ in range(2)]

    def pickles() -> None:
        torch_dist.all_gather_object([None, None], sent, group=control)

    figures = {"group": store, "proof": proof, "numbers": seconds(numbers, STEPS)}
    figures |= {"pickles": seconds(pickles, STEPS), "json": seconds(lambda: messages.gather(sent, control), STEPS)}
    print(json.dumps(figures))


def of_ranks(kind: str) -> dict[str, float]:
    """Return the slower rank's figures."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--rank"]
        ranks = [
            subprocess.Popen([*command, str(n), folder, kind], stdout=subprocess.PIPE, text=True) for n in range(2)
        ]
        outputs = [json.loads(output.communicate(timeout=300)[0]) for output in ranks]
    return {name: max(output[name] for output in outputs) for name in outputs[0]}


RUN = (
    "model=smollm2",
    "model.weights=random",
    "model.config_overrides={num_hidden_layers: 2, hidden_size: 64, intermediate_size: 128}",
    "data.train=rows.jsonl",
    "data.max_length=128",
    "data.split.validation=0",
    "trainer.precision=fp32",
    "trainer.micro_batch_size=2",
    "trainer.global_batch_size=4",
    "trainer.max_steps=60",
    "run.export=none",
    "launch.processes=2",
)


def write_rows(scratch: Path) -> None:
    """Write the data of RUN."""
    texts = [f"{number} and {number + 1} and some more words" for number in range(400)]
    turns = [[{"role": role, "content": text} for role in ("user", "assistant")] for text in texts]
    (scratch / "rows.jsonl").write_text("".join(f"{json.dumps({'messages': both})}\n" for both in turns))


def whole_run(tree: Path, scratch: Path, processors: set[int]) -> tuple[float, float]:
    """Return seconds from the command to the end of the first step, and of a step behind the tenth."""
    folder = scratch / "run"
    scratch.mkdir(exist_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
    environment = os.environ | {"PYTHONPATH": str(tree), "DSTUNE_TRUST_KEY": "0" * 64}
    write_rows(scratch)
    command = [sys.executable, "-m", "dstune", "train", *RUN, f"run.dir={folder}"]
    rows, first = folder / "metrics.jsonl", None
    with (scratch / "log").open("w") as log:
        began = time.perf_counter()
        process = subprocess.Popen(command, env=environment, cwd=scratch, stdout=log, stderr=log)
        os.sched_setaffinity(process.pid, processors)  # while it starts: what it starts has the same
        while process.poll() is None:
            if first is None and rows.is_file() and '"step_seconds"' in rows.read_text():
                first = time.perf_counter() - began
            time.sleep(0.02)
    if process.returncode or first is None:
        raise SystemExit((scratch / "log").read_text()[-3000:])
    steps = [row["step_seconds"] for row in map(json.loads, rows.read_text().splitlines()) if "step_seconds" in row]
    return first, statistics.median(steps[10:])


def beside(other: Path, rounds: int) -> None:
    """Run both trees at the same moment: by turns, one machine's runs differ by more than the trees do (0.925 to 1.01)."""
    trees = [TREE, other.resolve()]
    available = sorted(os.sched_getaffinity(0))
    if len(available) < 2:
        raise SystemExit("--beside needs two processors, one for each tree")
    halves = [set(available[0::2]), set(available[1::2])]
    pairs: list[tuple[tuple[float, float], tuple[float, float]]] = []
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
        scratch = [Path(folder) / name for name in ("this", "other")]
        for number in range(rounds + 1):
            this_tree, other_tree = pool.map(whole_run, trees, scratch, halves if number % 2 else halves[::-1])
            print(
                *(
                    f"{name} {first:.2f} s, {step:.4f} s"
                    for name, (first, step) in zip(("this", "other"), (this_tree, other_tree), strict=True)
                ),
                flush=True,
            )
            if number:  # the first one prepares the rows
                pairs.append((this_tree, other_tree))
    print("\n| | this tree | the other | this / the other |\n| --- | ---: | ---: | ---: |")
    for at, name in enumerate(("to the end of the first step, s", "a step, s")):
        sides = [statistics.median(pair[side][at] for pair in pairs) for side in (0, 1)]
        ratios = sorted(this_tree[at] / other_tree[at] for this_tree, other_tree in pairs)
        cells = (
            f"{sides[0]:.3g} | {sides[1]:.3g} | {statistics.median(ratios):.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f})"
        )
        print(f"| {name} | {cells} |")


SAVE_EVERY = 40
WARM_RUN = (f"checkpoint.every={SAVE_EVERY}", "evaluate.every=0", "trainer.max_steps=100000")


class TimedRun:
    """`dstune train` in the background; it is stopped without a save when the context ends."""

    def __init__(self, scratch: Path, variables: Mapping[str, str], *words: str):
        self.folder = scratch / "run"
        shutil.rmtree(self.folder, ignore_errors=True)
        last = {word.split("=")[0]: word for word in (*RUN, *WARM_RUN, *words, f"run.dir={self.folder}")}
        command = [sys.executable, "-m", "dstune", "train", *last.values()]
        environment = os.environ | {"PYTHONPATH": str(TREE), "DSTUNE_TRUST_KEY": "0" * 64} | variables
        self.began = time.perf_counter()
        self.log = scratch / "log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, env=environment, cwd=scratch, stdout=log, stderr=log)

    def __enter__(self) -> TimedRun:
        return self

    def __exit__(self, *exception: object) -> None:
        self.process.kill()
        self.process.wait()
        while self.ranks():  # the next start has the processors to itself
            time.sleep(0.05)

    def ranks(self) -> list[psutil.Process]:
        processes = []
        for process in psutil.process_iter(["cmdline", "status"]):
            words = process.info["cmdline"] or []
            if "dstune.worker" in words and str(self.folder) in words and process.info["status"] != "zombie":
                processes.append(process)
        return processes

    def wait_for(self, wanted: Callable[[int], bool]) -> float:
        """Return seconds since the command until the newest row is of a wanted step."""
        rows = self.folder / "metrics.jsonl"
        while True:
            lines = rows.read_text().splitlines() if rows.is_file() else []
            steps = [json.loads(line)["step"] for line in lines[-1:] if line.endswith("}")]
            if steps and wanted(steps[0]):
                return time.perf_counter() - self.began
            if self.process.poll() is not None:
                raise SystemExit(self.log.read_text()[-3000:])
            time.sleep(0.01)

    def seconds_to_train_again(self) -> float:
        """Measure the seconds from the kill of a rank, well after a save, to the first step after that save."""
        self.wait_for(lambda step: step > SAVE_EVERY)
        killed = self.ranks()[-1]
        self.wait_for(lambda step: 0.3 * SAVE_EVERY < step % SAVE_EVERY < 0.6 * SAVE_EVERY)
        began = time.perf_counter()
        killed.kill()
        self.wait_for(lambda step: 0 < step % SAVE_EVERY < 0.2 * SAVE_EVERY)
        return time.perf_counter() - began


def warm_and_cold(rounds: int) -> None:
    from dstune.launch.local import warm

    measured: dict[tuple[str, bool], list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as servers:
        scratch = Path(name)
        write_rows(scratch)
        # One for each number of ranks, since the number of threads is another one. The first run of each is not measured.
        offered = {ranks: servers.enter_context(warm.offer()) for ranks in (1, 2)}
        for number in range(rounds + 1):
            for ranks in (1, 2):
                of_ranks = f"launch.processes={ranks}"
                for is_warm in (False, True) if number % 2 else (True, False):
                    word = f"launch.warm={str(is_warm).lower()}"
                    with TimedRun(scratch, offered[ranks] if is_warm else {}, of_ranks, word) as run:
                        later = run.wait_for(bool)
                    with TimedRun(scratch, {}, of_ranks, word, "launch.restarts=1") as run:
                        first = run.wait_for(bool)
                        again = run.seconds_to_train_again()
                    s = "s" * (ranks > 1)
                    print(
                        f"{ranks} rank{s}, {word}: first {first:.1f}, later {later:.1f}, again {again:.1f} s",
                        flush=True,
                    )
                    for measurement, value in (
                        ("a first start", first),
                        ("a later start", later),
                        ("training again after a kill", again),
                    ):
                        if number:
                            measured[f"{measurement}, {ranks} rank{s}", is_warm].append(value)
    print(
        f"\nload {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores\n\n| seconds to the first step | cold | warm | warm / cold |"
    )
    print("| --- | ---: | ---: | ---: |")
    for measurement in dict.fromkeys(measurement for measurement, _ in measured):
        cold, forked = measured[measurement, False], measured[measurement, True]
        ratios = sorted(warm_seconds / cold_seconds for warm_seconds, cold_seconds in zip(forked, cold, strict=True))
        middle = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        print(f"| {measurement} | {statistics.median(cold):.1f} | {statistics.median(forked):.1f} | {middle} |")


def main() -> None:
    if sys.argv[1:2] == ["--rank"]:
        rank(int(sys.argv[2]), sys.argv[3], sys.argv[4])
        return
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--beside", type=Path, metavar="TREE")
    arguments.add_argument("--warm", action="store_true")
    arguments.add_argument("--rounds", type=int, default=6)
    options = arguments.parse_args()
    if options.warm:
        warm_and_cold(options.rounds)
        return
    if options.beside is not None:
        beside(options.beside, options.rounds)
        return
    from dstune.launch.commands import free_port

    rows = of_signing() | of_tokenizer()
    files = [of_ranks("file") for _ in range(3)]
    ports = [of_ranks(str(free_port())) for _ in range(3)]

    def middle(runs: list[dict[str, float]], name: str) -> float:
        return statistics.median(run[name] for run in runs)

    rows["a group that meets in a folder, beside one that meets at a port"] = middle(files, "group") - middle(
        ports, "group"
    )
    rows["proof that ranks are of one launch, for each of the two groups"] = middle(files, "proof")
    print("| a launch starts later by | ms |\n| --- | ---: |")
    for name, value in rows.items():
        print(f"| {name} | {1e3 * value:.1f} |")
    print(f"| all of it | {1e3 * (sum(rows.values()) + middle(files, 'proof')):.1f} |")
    print("\n| a message of ranks | us |\n| --- | ---: |")
    names = {
        "numbers": "the gather of every step",
        "pickles": "2 x 16 vectors of 384 as a pickle",
        "json": "the same as JSON",
    }
    for name, text in names.items():
        print(f"| {text} | {1e6 * middle(files, name):.0f} |")


if __name__ == "__main__":
    main()
