"""Text generation of two checkouts side by side, and beside the continuous batching of transformers.

    python benchmarks/generation.py runs --against OLD [--model sample://smollm2] [--rounds 2]
    python benchmarks/generation.py engines --against OLD [--model sample://smollm2] [--rounds 3]
    python benchmarks/generation.py transformers [--model sample://smollm2] [--rounds 3]

`runs` trains with `task=reinforcement` and both samplers of this process. It prints

- whether both trees write the same rollouts to the bit, and whether a run that is killed in its third step ends with the same
  rollouts and the same metrics as the undisturbed one;
- how far the sampler's log-probabilities are from those of the training forward pass (mean and largest, in nats);
- processor seconds of a step, and of its sampling alone.

`engines` serves the model with `dstune serve --prove`, which compares the engine's answers with what training computes. It prints
for 1 and 8 streams tokens/s, processor milliseconds of the engine for a token, and whether both trees give the same answers.

`transformers` gives both continuous batchers the same prompts, greedy, in one process and in turn: processor milliseconds for a
token, and which texts differ from `generate` of each prompt alone.

`--model tiny` is a random model of two layers. Packages are those of the interpreter that runs this. The order of the trees
alternates from round to round. Every command prints JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx2
import psutil

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

SAMPLERS = ("exact", "fast")
STREAMS = (1, 8)
TIMER = """
import json, time
import dstune
from dstune.protocols.callback import CONTINUE

@dstune.callback
class ProcessorTime(dstune.Callback):
    name = "processor_time"
    generating = 0.0

    def on_step_begin(self, run, step):
        if step.number_in_launch == 0:
            complete = run.rollouts.complete

            def timed(*arguments, **named):
                began = time.process_time()
                result = complete(*arguments, **named)
                self.generating += time.process_time() - began
                return result

            run.rollouts.complete = timed

    def on_step_agreed(self, run, step):
        with open("processor_time.jsonl", "a") as file:
            file.write(json.dumps({"seconds": time.process_time(), "generating": self.generating}) + "\\n")
        return CONTINUE

@dstune.reward
def vowels(prompts, completions, **kwargs):
    return [sum(letter in "aeiou" for letter in text) / max(1, len(text)) for text in completions]
"""
QUESTIONS = ("Tell me about the sea.", "Why is the sky blue?", "Write a short poem.", "Name five rivers of Europe.")


def environment(tree: Path) -> dict[str, str]:
    threads = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    return os.environ | threads | {"PYTHONPATH": str(tree), "HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline"}


# -- runs -------------------------------------------------------------------------------------------------------------


def train(tree: Path, folder: Path, model: str, sampler: str, *, kill_after: int = 0) -> Path:
    """Train 4 steps in `folder` and return the run's directory. kill_after: the step after whose rollouts the run is killed once
    and continued."""
    folder.mkdir()
    (folder / "timer.py").write_text(TIMER)
    rows = [{"prompt": f"{QUESTIONS[number % 4]} ({number})"} for number in range(40)]
    (folder / "prompts.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    command = [sys.executable, "-m", "dstune", "train", "task=reinforcement", "run.dir=run", "plugins=[./timer.py]"]
    command += ["trainer.callbacks=[processor_time]", "launch.processes=1", "zero=stage0", "schedule=constant"]
    command += ["evaluate.samples=0", "evaluate.every=0", "run.export=none", "checkpoint.every=1"]
    command += [f"model.path={model}", "model.chat_template=null", "data.train=prompts.jsonl", "data.clean.leaks=false"]
    command += ["data.split.validation=0", "task.rewards=[vowels]", "task.max_new_tokens=24", "task.samples=4"]
    command += [f"task.rollout={sampler}", "method=full", "trainer.precision=fp32", "optimizer.lr=1e-6"]
    command += ["trainer.global_batch_size=4", "trainer.micro_batch_size=8", "trainer.max_steps=4"]
    log = folder / "log"
    if kill_after:
        with log.open("w") as output:
            run = psutil.Popen(command, cwd=folder, env=environment(tree), stdout=output, stderr=subprocess.STDOUT)
        while not (folder / "run" / "rollouts" / f"step-{kill_after:06d}.jsonl").is_file():
            if run.poll() is not None:
                raise SystemExit(log.read_text())
            time.sleep(0.02)
        for process in [*run.children(recursive=True), run]:
            process.send_signal(signal.SIGKILL)
        run.wait()
    done = subprocess.run(command, cwd=folder, env=environment(tree), capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{done.stdout}\n{done.stderr}")
    return folder / "run"


def rollouts_of(run: Path) -> list[str]:
    return [path.read_text() for path in sorted((run / "rollouts").glob("step-*.jsonl"))]


def rows_of(run: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "reward" in row]


def values_of(run: Path) -> list[dict[str, Any]]:
    """Return the metrics of each step that are no times."""
    times = ("seconds", "per_second", "time", "_gib", "utilization", "mfu", "flops")
    return [
        {name: row[name] for name in sorted(row) if not any(word in name for word in times)} for row in rows_of(run)
    ]


def seconds_of(run: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (run.parent / "processor_time.jsonl").read_text().splitlines()]
    return [{name: later[name] - earlier[name] for name in later} for earlier, later in itertools.pairwise(rows)]


def compare_runs(trees: dict[str, Path], folder: Path, model: str, rounds: int) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    for sampler in SAMPLERS:
        runs: dict[str, list[Path]] = {name: [] for name in trees}
        for number in range(rounds):
            for name in sorted(trees, reverse=bool(number % 2)):
                place = folder / f"{sampler}-{name}-{number}"
                runs[name].append(train(trees[name], place, model, sampler))
        killed = {
            name: train(tree, folder / f"{sampler}-{name}-killed", model, sampler, kill_after=3)
            for name, tree in trees.items()
        }
        one, other = (runs[name][0] for name in trees)
        figures[sampler] = {
            "equal_rollouts_and_metrics": rollouts_of(one) == rollouts_of(other) and values_of(one) == values_of(other),
            "equal_after_a_kill": {
                name: rollouts_of(run) == rollouts_of(runs[name][0]) and values_of(run) == values_of(runs[name][0])
                for name, run in killed.items()
            },
        }
        for name, several in runs.items():
            steps = [step for run in several for step in seconds_of(run)]
            rows = [row for run in several for row in rows_of(run)]
            figures[sampler][name] = {
                "processor_seconds_of_a_step": statistics.median(step["seconds"] for step in steps),
                "of_sampling": statistics.median(step["generating"] for step in steps),
                "mean_difference": max(row["sampling/sampling_logp_difference/mean"] for row in rows),
                "largest_difference": max(row["sampling/sampling_logp_difference/max"] for row in rows),
            }
    return figures


# -- the local engine -------------------------------------------------------------------------------------------------


class Served:
    """A `dstune serve` of one tree."""

    def __init__(self, tree: Path, model: str, folder: Path, name: str):
        self.state, log = folder / f"state-{name}", folder / f"serve-{name}.log"
        argv = [sys.executable, "-m", "dstune", "serve", "--port", "0", "--state", str(self.state), model]
        argv += ["--prove", "--dtype", "float32", "--threads", "1"]
        with log.open("wb") as errors:
            self.process = psutil.Popen(argv, env=environment(tree), stdout=subprocess.PIPE, stderr=errors, text=True)
        assert self.process.stdout is not None
        for line in self.process.stdout:
            url, serves, models = line.strip().partition("/v1  serves ")
            if serves:
                self.url, self.model = url, models.split(", ")[0]
                self.is_proven = "unproven" not in log.read_text()
                return
        raise SystemExit(log.read_text())

    def processor_seconds(self) -> float:
        times = [process.cpu_times() for process in self.process.children(recursive=True)]
        return sum(one.user + one.system for one in times)

    async def answer(self, question: str, **fields: Any) -> tuple[str, int]:
        """Return the text of an answer, and its tokens."""
        body = {"model": self.model, "messages": [{"role": "user", "content": question}], "max_tokens": 32, **fields}
        headers = {"authorization": f"Bearer {(self.state / 'key').read_text().strip()}"}
        async with httpx2.AsyncClient(base_url=self.url, headers=headers, timeout=600, trust_env=False) as client:
            response = await client.post("/v1/chat/completions", json=body)
        assert response.status_code == 200, response.text
        answer = response.json()
        return answer["choices"][0]["message"]["content"], answer["usage"]["completion_tokens"]


async def ask(server: Served, streams: int) -> tuple[float, float, list[str]]:
    """Return tokens/s, processor milliseconds for a token, and the greedy answers."""
    began, processor = time.perf_counter(), server.processor_seconds()
    questions = [f"{QUESTIONS[number % 4]} ({number})" for number in range(streams)]
    answers = await asyncio.gather(*(server.answer(question, temperature=0) for question in questions))
    tokens = sum(count for _, count in answers)
    spent = server.processor_seconds() - processor
    return tokens / (time.perf_counter() - began), 1000 * spent / tokens, [text for text, _ in answers]


async def compare_engines(trees: dict[str, Path], folder: Path, model: str, rounds: int) -> dict[str, Any]:
    servers: dict[str, Served] = {}
    measured: dict[tuple[str, int], list[tuple[float, float, list[str]]]] = {}
    try:
        for name, tree in trees.items():
            servers[name] = Served(tree, model, folder, name)
            await servers[name].answer("Hello", temperature=0)
        for number in range(rounds):
            for streams in STREAMS:
                for name in sorted(servers, reverse=bool(number % 2)):
                    measured.setdefault((name, streams), []).append(await ask(servers[name], streams))
    finally:
        for server in servers.values():
            server.process.terminate()
            server.process.wait(60)
    figures: dict[str, Any] = {"proven": {name: server.is_proven for name, server in servers.items()}}
    for streams in STREAMS:
        texts = {tuple(answers) for name in servers for *_, answers in measured[name, streams]}
        figures[str(streams)] = {"equal_answers": len(texts) == 1} | {
            name: {
                "tokens_per_second": statistics.median(rate for rate, _, _ in measured[name, streams]),
                "processor_ms_of_a_token": statistics.median(spent for _, spent, _ in measured[name, streams]),
            }
            for name in servers
        }
    return figures


# -- transformers -----------------------------------------------------------------------------------------------------


def beside_transformers(path: str, rounds: int) -> dict[str, Any]:
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer, ContinuousBatchingConfig, GenerationConfig

    torch.set_num_threads(1)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)
    prompts = [tokenizer(f"{QUESTIONS[number % 4]} ({number})").input_ids for number in range(8)]
    count = 32
    alone = [
        model.generate(torch.tensor([ids]), max_new_tokens=count, do_sample=False, eos_token_id=None)[
            0, len(ids) :
        ].tolist()
        for ids in prompts
    ]

    def ours() -> list[list[int]]:
        from dstune.generation.batch import pad, read

        with torch.inference_mode():
            batch, logits = read(model, *pad(prompts, 0, torch.device("cpu")))
            columns = [logits.argmax(-1)]
            while len(columns) < count:
                columns.append(batch.step(columns[-1]).argmax(-1))
        return torch.stack(columns, dim=1).tolist()

    def theirs() -> list[list[int]]:
        settings = GenerationConfig(max_new_tokens=count, do_sample=False, eos_token_id=-1)
        limits = ContinuousBatchingConfig(num_blocks=64, max_batch_tokens=512)
        outputs = model.generate_batch(
            prompts, generation_config=settings, continuous_batching_config=limits, progress_bar=False, warmup=False
        )
        return [list(output.generated_tokens) for output in sorted(outputs.values(), key=lambda one: one.request_id)]

    spent: dict[str, list[float]] = {"dstune": [], "transformers": []}
    texts: dict[str, list[list[int]]] = {}
    for number in range(rounds):
        sides = [("dstune", ours), ("transformers", theirs)]
        for name, write in reversed(sides) if number % 2 else sides:
            began = time.process_time()
            texts[name] = write()
            spent[name].append(1000 * (time.process_time() - began) / (len(prompts) * count))
    return {
        "transformers": transformers.__version__,
        "processor_ms_of_a_token": {name: statistics.median(values) for name, values in spent.items()},
        "differ_from_generate": {
            name: sum(ids != expected for ids, expected in zip(several, alone, strict=True))
            for name, several in texts.items()
        },
    }


def model_folder(model: str, folder: Path) -> str:
    from dstune import samples
    from dstune.testing.tiny import save_model

    if model == "tiny":
        save_model(folder / "model", [{"text": " ".join([*QUESTIONS, *map(str, range(40))])}], decoder=True)
        return str(folder / "model")
    return str(samples.resolve(model)) if samples.is_sample(model) else str(Path(model).resolve())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("runs", "engines", "transformers"))
    parser.add_argument("--against", type=Path, metavar="OLD", help="a checkout of an earlier commit")
    parser.add_argument("--model", default="sample://smollm2")
    parser.add_argument("--rounds", type=int, default=2)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="dstune-generation-") as name:  # runs of SmolLM2 take some 20 GB
        folder = Path(name)
        model = model_folder(arguments.model, folder)
        if arguments.what == "transformers":
            result = beside_transformers(model, arguments.rounds)
        else:
            trees = {"new": ROOT, "old": arguments.against.resolve()}
            if arguments.what == "runs":
                result = compare_runs(trees, folder, model, arguments.rounds)
            else:
                result = asyncio.run(compare_engines(trees, folder, model, arguments.rounds))
    result["load"] = os.getloadavg()[0]
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
