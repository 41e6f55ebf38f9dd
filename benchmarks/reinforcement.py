"""Reinforcement measured: does it learn, and what does a step cost beside TRL's.

    python benchmarks/reinforcement.py tokens             a random model learns to repeat a word: steps and processor time to 0.95
    python benchmarks/reinforcement.py trl --pairs 3      steps of dstune and of TRL on the same work, one after the other
    python benchmarks/reinforcement.py smollm2 --seeds 3  SmolLM2-135M learns to answer in a given number of words

Processor time, not seconds: other work on the machine does not count. Every command prints JSON.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
TIMER = '''
import json, time
import dstune
from dstune.protocols.callback import CONTINUE

@dstune.callback
class ProcessorTime(dstune.Callback):
    name = "processor_time"
    generating = 0.0

    def on_step_begin(self, run, step):
        if step.number_in_launch == 0 and hasattr(run.rollouts, "complete"):
            complete = run.rollouts.complete

            def timed(*arguments, **named):
                began = time.process_time()
                found = complete(*arguments, **named)
                self.generating += time.process_time() - began
                return found

            run.rollouts.complete = timed

    def on_step_agreed(self, run, step):
        with open("processor_time.jsonl", "a") as file:
            row = {"step": step.number, "seconds": time.process_time(), "generating": self.generating}
            file.write(json.dumps(row) + "\\n")
        return CONTINUE

@dstune.reward
def repeats(prompts, completions, word, **kwargs):
    return [text.split().count(one) / 8 for text, one in zip(completions, word)]

@dstune.reward
def vowels(prompts, completions, **kwargs):
    """The share of vowels: something that any text has, and no work to compute."""
    texts = [text if isinstance(text, str) else text[0]["content"] for text in completions]
    return [sum(letter in "aeiou" for letter in text) / max(1, len(text)) for text in texts]
'''
WORDS = [f"w{number}" for number in range(16)]
PROMPTS = ("The capital of France is", "Water boils when", "A good breakfast has", "The moon is", "Birds fly because",
           "To make tea you", "My favourite colour is", "The train leaves")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("tokens", "trl", "smollm2", "trl-run"))
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--model", default="sample://smollm2", help="or `tiny`: two random layers")
    arguments = parser.parse_args()
    if arguments.what == "trl-run":
        run_trl(arguments)
        return
    with tempfile.TemporaryDirectory(prefix="reinforcement-") as folder:
        measured = {"tokens": learn_tokens, "trl": beside_trl, "smollm2": learn_words}[arguments.what](
            Path(folder), arguments
        )
    print(json.dumps(measured, indent=1))


def environment() -> dict[str, str]:
    threads = {
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "WANDB_MODE": "offline",
    }
    return os.environ | threads | {"PYTHONPATH": str(ROOT)}


def train(folder: Path, name: str, *overrides: str) -> Path:
    (folder / "timer.py").write_text(TIMER)
    (folder / "processor_time.jsonl").unlink(missing_ok=True)
    command = [sys.executable, "-m", "dstune", "train", "task=reinforcement", f"run.dir={name}", "plugins=[./timer.py]"]
    command += ["trainer.callbacks=[processor_time]", "launch.processes=1", "zero=stage0", "schedule=constant"]
    command += ["evaluate.samples=0", "run.export=none", "checkpoint.every=0", *overrides]
    done = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout}\n{done.stderr}")
    return folder / name


def rows_of(run: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "reward" in row]


def times_of(folder: Path, name: str = "seconds") -> list[float]:
    """Return processor seconds of each step but the first; "generating": of its sampling alone."""
    ends = [json.loads(line)[name] for line in (folder / "processor_time.jsonl").read_text().splitlines()]
    return [later - earlier for earlier, later in itertools.pairwise(ends)]


def write_rows(folder: Path, rows: list[dict[str, Any]]) -> None:
    (folder / "prompts.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def learn_tokens(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    from dstune.testing.tiny import save_model

    rows = [{"prompt": WORDS[n % 16], "word": WORDS[n % 16], "n": n} for n in range(160)]
    save_model(folder / "model", rows, decoder=True)
    (folder / "model" / "chat_template.jinja").unlink()
    write_rows(folder, rows)
    reached = []
    for seed in range(arguments.seeds):
        settings = ["model.path=model", "model.weights=random", "model.config_overrides={initializer_range:0.1}"]
        settings += ["data.train=prompts.jsonl", "data.clean.leaks=false", "task.rewards=[repeats]", "method=full"]
        settings += ["task.max_new_tokens=8", "task.samples=8", "optimizer.lr=5e-3", "trainer.precision=fp32"]
        settings += ["trainer.micro_batch_size=64", "trainer.global_batch_size=16", "trainer.max_steps=150"]
        run = train(folder, f"tokens-{seed}", *settings, f"trainer.seed={seed}", "evaluate.every=0")
        rewards = [row["reward"] for row in rows_of(run)]
        times = times_of(folder)
        first = next((n for n in range(4, len(rewards)) if sum(rewards[n - 4 : n + 1]) / 5 >= 0.95), None)
        spent = None if first is None else round(sum(times[:first]), 1)
        largest = max(row["sampling/sampling_logp_difference/max"] for row in rows_of(run))
        steps = None if first is None else first + 1
        told = {"seed": seed, "first": rewards[0], "last": rewards[-1], "steps_to_0.95": steps}
        reached.append(told | {"processor_seconds": spent, "largest_difference": largest})
    return {"task": "repeat the word, 8 tokens, 2 layers", "runs": reached}


def beside_trl(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    from dstune import samples

    count = arguments.prompts
    if arguments.model == "tiny":
        from dstune.testing.tiny import save_model

        words = {"text": " ".join([*PROMPTS, *map(str, range(count * arguments.steps))])}
        save_model(folder / "model", [words], decoder=True)
        (folder / "model" / "chat_template.jinja").unlink()
        model = str(folder / "model")
    else:
        model = str(samples.resolve(arguments.model)) if arguments.model.startswith("sample://") else arguments.model
    write_rows(folder, [{"prompt": f"{PROMPTS[n % 8]} {n}"} for n in range(count * arguments.steps)])
    settings = [
        f"model.path={model}",
        "model.chat_template=null",
        "data.train=prompts.jsonl",
        "data.split.validation=0",
    ]
    settings += [
        "task.rewards=[vowels]",
        f"task.max_new_tokens={arguments.tokens}",
        f"task.samples={arguments.samples}",
    ]
    settings += ["method=full", "trainer.precision=fp32", "optimizer.lr=1e-6", f"trainer.global_batch_size={count}"]
    settings += [f"trainer.micro_batch_size={count * arguments.samples}", f"trainer.max_steps={arguments.steps}"]
    settings += ["evaluate.every=0", "trainer.activation_checkpointing=false"]
    dstune_seconds, trl_seconds, dstune_generating, trl_generating = [], [], [], []
    lengths, trl_lengths = [], []
    for pair in range(arguments.pairs):
        run = train(folder, f"run-{pair}", *settings)
        dstune_seconds += times_of(folder)
        dstune_generating += times_of(folder, "generating")
        lengths += [row["completions/mean_length"] for row in rows_of(run)[1:]]
        command = [sys.executable, __file__, "trl-run", "--model", model, "--steps", str(arguments.steps)]
        command += ["--prompts", str(count), "--samples", str(arguments.samples), "--tokens", str(arguments.tokens)]
        done = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(done.stderr)
        told = json.loads(done.stdout.splitlines()[-1])
        trl_seconds += told["seconds"]
        trl_generating += told["generating"]
        trl_lengths += told["lengths"]
    return {
        "work": f"{count} prompts x {arguments.samples} samples x {arguments.tokens} tokens, fp32, one thread",
        "steps": len(dstune_seconds),
        "dstune_processor_seconds": statistics.median(dstune_seconds),
        "trl_processor_seconds": statistics.median(trl_seconds),
        "ratio": statistics.median(dstune_seconds) / statistics.median(trl_seconds),
        "share_of_generation": {
            "dstune": sum(dstune_generating) / sum(dstune_seconds),
            "trl": sum(trl_generating) / sum(trl_seconds),
        },
        "dstune": dstune_seconds,
        "trl": trl_seconds,
        "tokens_of_a_completion": {"dstune": statistics.mean(lengths), "trl": statistics.mean(trl_lengths)},
    }


def run_trl(arguments: argparse.Namespace) -> None:
    """Run TRL's GRPOTrainer once on the rows in the working directory."""
    import torch
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    torch.set_num_threads(1)
    generating = 0.0
    ends: list[tuple[float, float]] = []
    """At the end of each step: processor seconds, and those of sampling among them."""

    class Timer(TrainerCallback):
        def on_step_end(self, *arguments: Any, **keywords: Any) -> None:
            ends.append((time.process_time(), generating))

    class TimedTrainer(GRPOTrainer):
        def _generate(self, *arguments: Any, **keywords: Any) -> Any:
            nonlocal generating
            began = time.process_time()
            found = super()._generate(*arguments, **keywords)
            generating += time.process_time() - began
            return found

    def vowels(completions: list[str], **kwargs: Any) -> list[float]:
        return [sum(letter in "aeiou" for letter in text) / max(1, len(text)) for text in completions]

    rows = arguments.prompts * arguments.samples
    config = GRPOConfig(
        output_dir="trl",
        per_device_train_batch_size=rows,
        num_generations=arguments.samples,
        max_completion_length=arguments.tokens,
        max_steps=arguments.steps,
        learning_rate=1e-6,
        beta=0.0,
        bf16=False,
        gradient_checkpointing=False,
        report_to=[],
        save_strategy="no",
        logging_steps=1,
        use_cpu=True,
    )
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    tokenizer.chat_template = None
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    trainer = TimedTrainer(
        model=model,
        processing_class=tokenizer,
        reward_funcs=vowels,
        args=config,
        train_dataset=load_dataset("json", data_files="prompts.jsonl", split="train"),
        callbacks=[Timer()],
    )
    trainer.train()
    lengths = [log["completions/mean_length"] for log in trainer.state.log_history if "completions/mean_length" in log]
    steps = [[later - earlier for earlier, later in zip(*pair, strict=True)] for pair in itertools.pairwise(ends)]
    told = {"seconds": [step[0] for step in steps], "generating": [step[1] for step in steps]}
    print(json.dumps(told | {"lengths": lengths[1:]}))


def learn_words(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return a verifiable task that a small model can do in part: so many words, no more and no less."""
    questions = [f"{prompt}? Answer in {words} words." for prompt in PROMPTS for words in (3, 5, 8)]
    counts = [words for _ in PROMPTS for words in (3, 5, 8)]
    write_rows(
        folder, [{"prompt": question, "words": words} for question, words in zip(questions, counts, strict=True)]
    )
    runs = []
    for seed in range(arguments.seeds):
        settings = [
            f"model.path={arguments.model}",
            "data.train=prompts.jsonl",
            "data.split.validation=0",
            "method=lora",
        ]
        settings += ["task.rewards=[word_count]", f"task.max_new_tokens={arguments.tokens}", "task.samples=4"]
        settings += [
            "trainer.precision=fp32",
            "optimizer.lr=2e-4",
            "trainer.global_batch_size=8",
            "trainer.micro_batch_size=32",
        ]
        settings += [
            f"trainer.max_steps={arguments.steps}",
            f"trainer.seed={seed}",
            "evaluate.every=0",
            "method.dropout=0",
        ]
        rewards = [row["reward"] for row in rows_of(train(folder, f"words-{seed}", *settings))]
        edge = max(1, len(rewards) // 5)
        runs.append(
            {
                "seed": seed,
                "first": sum(rewards[:edge]) / edge,
                "last": sum(rewards[-edge:]) / edge,
                "steps": len(rewards),
            }
        )
    return {"task": f"answer in 3, 5 or 8 words, {arguments.tokens} tokens, LoRA", "runs": runs}


if __name__ == "__main__":
    main()
