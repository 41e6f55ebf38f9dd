"""Reinforcement measured: does it learn, and what does a step cost beside TRL's.

    python benchmarks/reinforcement.py tokens             a random model learns to repeat a word: steps and processor time to 0.95
    python benchmarks/reinforcement.py trl --pairs 3      steps of dstune and of TRL on the same work, one after the other
    python benchmarks/reinforcement.py smollm2 --seeds 3  SmolLM2-135M learns to say the sum of two digits
    python benchmarks/reinforcement.py tool --seeds 3     a random model learns to look a word up by a tool and to say it

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
HIDDEN = '''
import dstune

@dstune.environment
class Hidden(dstune.Environment):
    """A word that only a tool tells."""

    name = "hidden"

    def reset(self, **row):
        self.word, self.peeked = self.random.choice([f"w{n}" for n in range(8)]), False

    def peek(self) -> str:
        """Look at the word."""
        self.peeked = True
        return " ".join([self.word] * 8)

@dstune.reward
def says_the_word(prompts, completions, environments, **kwargs):
    """0.3 for looking, and the rest for the share of the word in what is said behind it."""
    scores = []
    for messages, environment in zip(completions, environments):
        words = messages[-1]["content"].split() if len(messages) > 1 else []
        share = words.count(environment.word) / max(1, len(words))
        scores.append((0.3 + 0.7 * share) * environment.peeked)
    return scores
'''
TOOL_TEMPLATE = (
    "{% if tools %}<|im_start|> tools {% for tool in tools %} {{ tool.function.name }} {% endfor %} <|im_end|> {% endif %}"
    "{% for message in messages %} <|im_start|> {{ message.role }} {{ message.content or '' }}"
    '{% for call in message.tool_calls or [] %} <tool_call>{"name":"{{ call.function.name }}","arguments":'
    "{{ call.function.arguments if call.function.arguments is string else call.function.arguments | tojson }}}</tool_call>"
    "{% endfor %} <|im_end|> {% endfor %}{% if add_generation_prompt %} <|im_start|> assistant {% endif %}"
)
"""In which a whole call is one word."""
TOOL_SETTINGS = [
    "task.rewards=[says_the_word]",
    "task.samples=8",
    "task.max_new_tokens=24",
    "optimizer.lr=3e-3",
    "trainer.global_batch_size=16",
    "trainer.micro_batch_size=128",
]
DEFAULTS: dict[str, dict[str, int]] = {
    "tokens": {},
    "trl": {"steps": 4, "prompts": 4, "samples": 4, "tokens": 16},
    "smollm2": {"steps": 40, "prompts": 8, "samples": 8, "tokens": 3},
    "tool": {"steps": 170},
}
THREADS = {"OMP_NUM_THREADS": "1"}
WORDS = [f"w{number}" for number in range(16)]
PROMPTS = ("The capital of France is", "Water boils when", "A good breakfast has", "The moon is", "Birds fly because",
           "To make tea you", "My favourite colour is", "The train leaves")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=(*DEFAULTS, "trl-run"))
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=3)
    for name in ("steps", "prompts", "samples", "tokens"):
        parser.add_argument(f"--{name}", type=int, help="each command has its own default")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--model", default="sample://smollm2", help="or `tiny`: two random layers")
    arguments = parser.parse_args()
    for name, value in DEFAULTS.get(arguments.what, {}).items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    THREADS["OMP_NUM_THREADS"] = str(arguments.threads)
    if arguments.what == "trl-run":
        run_trl(arguments)
        return
    with tempfile.TemporaryDirectory(prefix="reinforcement-") as folder:
        commands = {"tokens": learn_tokens, "trl": beside_trl, "smollm2": learn_sums, "tool": learn_tool}
        measured = commands[arguments.what](Path(folder), arguments)
    print(json.dumps(measured, indent=1))


def environment() -> dict[str, str]:
    further = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline"}
    return os.environ | THREADS | further | {"PYTHONPATH": str(ROOT)}


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
        summary = {"seed": seed, "first": rewards[0], "last": rewards[-1], "steps_to_0.95": steps}
        reached.append(summary | {"processor_seconds": spent, "largest_difference": largest})
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
        measured = json.loads(done.stdout.splitlines()[-1])
        trl_seconds += measured["seconds"]
        trl_generating += measured["generating"]
        trl_lengths += measured["lengths"]
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
    measured = {"seconds": [step[0] for step in steps], "generating": [step[1] for step in steps]}
    print(json.dumps(measured | {"lengths": lengths[1:]}))


def learn_sums(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure a verifiable task that the model can do and rarely does: after `3 + 4 =` it says the sum one time in ten."""
    # A conversation would be answered in words.
    ending = "{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}"
    (folder / "plain.jinja").write_text("{% for message in messages %}{{ message.content }}" + ending + "{% endfor %}")
    sums = [(first, second) for first in range(1, 9) for second in range(1, 9) if first + second <= 9]
    write_rows(folder, [{"prompt": f"{one} + {two} =", "pattern": rf"^\s*{one + two}(?!\d)"} for one, two in sums])
    runs = []
    for seed in range(arguments.seeds):
        settings = [f"model.path={arguments.model}", "model.chat_template=plain.jinja", "data.train=prompts.jsonl"]
        settings += ["data.split.validation=0", "method=lora", "task.rewards=[pattern]", "trainer.precision=fp32"]
        settings += [
            f"task.max_new_tokens={arguments.tokens}",
            f"task.samples={arguments.samples}",
            "optimizer.lr=5e-4",
        ]
        settings += [f"trainer.global_batch_size={arguments.prompts}", f"trainer.max_steps={arguments.steps}"]
        settings += [f"trainer.micro_batch_size={arguments.prompts * arguments.samples}", f"trainer.seed={seed}"]
        settings += ["evaluate.every=0", "trainer.activation_checkpointing=false"]
        began = time.monotonic()
        rows = rows_of(train(folder, f"sums-{seed}", *settings))
        rewards, edge = [row["reward"] for row in rows], max(1, len(rows) // 8)
        summary: dict[str, Any] = {"seed": seed, "steps": len(rewards), "seconds": round(time.monotonic() - began)}
        summary |= {"first": sum(rewards[:edge]) / edge, "last": sum(rewards[-edge:]) / edge}
        summary["processor_seconds_a_step"] = round(statistics.median(times_of(folder)), 2)
        summary["largest_difference"] = max(row["sampling/sampling_logp_difference/max"] for row in rows)
        runs.append(summary)
        print(json.dumps(summary), file=sys.stderr, flush=True)
    work = f"{arguments.prompts} prompts x {arguments.samples} samples x {arguments.tokens} tokens"
    return {"task": f"say the sum of two digits, {work}, LoRA, fp32", "threads": arguments.threads, "runs": runs}


def learn_tool(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure a task with a tool: it alone knows a word, and the model has to call it, read what it says, and say that."""
    from dstune.testing.tiny import save_model

    words = [f"w{number}" for number in range(8)]
    call = '<tool_call>{"name":"peek","arguments":{}}</tool_call>'
    save_model(
        folder / "model", [{"prompt": f"go user assistant tool tools peek {call} {' '.join(words)}"}], decoder=True
    )
    (folder / "model" / "chat_template.jinja").write_text(TOOL_TEMPLATE)
    (folder / "hidden.py").write_text(HIDDEN)
    write_rows(folder, [{"prompt": "go", "n": number} for number in range(64)])
    runs = []
    for seed in range(arguments.seeds):
        settings = ["model.path=model", "model.weights=random", "model.config_overrides={initializer_range:0.1}"]
        settings += ["data.train=prompts.jsonl", "data.clean.leaks=false", "method=full", "trainer.precision=fp32"]
        settings += ["plugins=[./timer.py,./hidden.py]", "task.environment=hidden", "task.turns=2", *TOOL_SETTINGS]
        settings += [f"trainer.seed={seed}", f"trainer.max_steps={arguments.steps}", "evaluate.every=0"]
        rows = rows_of(train(folder, f"tool-{seed}", *settings))
        rewards, times = [row["reward"] for row in rows], times_of(folder)
        means = [sum(rewards[end - 5 : end]) / 5 for end in range(5, len(rewards) + 1)]
        first = next((number + 4 for number, mean in enumerate(means) if mean >= 0.9), None)
        summary = {"seed": seed, "first": rewards[0], "last": means[-1], "steps": len(rewards)}
        summary |= {"steps_to_0.9": None if first is None else first + 1}
        summary |= {"processor_seconds_to_0.9": None if first is None else round(sum(times[:first]), 1)}
        calls = [row["tools/call_frequency"] for row in rows]
        summary |= {"calls_first": calls[0], "calls_last": sum(calls[-5:]) / 5}
        runs.append(summary)
        print(json.dumps(summary), file=sys.stderr, flush=True)
    return {"task": "look a word up by a tool, then say it; 2 random layers", "runs": runs}


if __name__ == "__main__":
    main()
