"""A model learns to call a tool before it answers, on ranks."""

from __future__ import annotations

import json

import pytest
from support.command import Commands, metrics
from support.tool_template import TEMPLATE, call_of

from dstune.testing.tiny import save_model

WORDS = [f"w{number}" for number in range(8)]
HIDDEN = '''
import dstune

@dstune.environment
class Hidden(dstune.Environment):
    """A word that only a tool tells."""

    name = "hidden"

    def reset(self, **row):
        self.word, self.peeked, self.said = self.random.choice([f"w{n}" for n in range(8)]), False, ""

    def peek(self) -> str:
        """Look at the word."""
        self.peeked = True
        return self.word

@dstune.reward
def says_the_word(prompts, completions, environments, **kwargs):
    """0.3 for looking, and the rest for what is said behind it."""
    scores = []
    for messages, environment in zip(completions, environments):
        said = messages[-1]["content"].split() if len(messages) > 1 else []
        share = said.count(environment.word) / max(4, len(said))
        scores.append(0.3 * environment.peeked + 0.7 * min(1.0, 4 * share) * environment.peeked)
    return scores
'''
RUN = [
    "task=reinforcement",
    "model.path=model",
    "data.train=prompts.jsonl",
    "data.clean.leaks=false",  # a prompt is the same everywhere; what differs is the environment
    "plugins=[./hidden.py]",
    "task.environment=hidden",
    "task.rewards=[says_the_word]",
    "task.turns=2",
    "task.samples=8",
    "task.max_new_tokens=24",
    "method=full",
    "model.weights=random",
    "model.config_overrides={initializer_range:0.1}",
    "trainer.precision=fp32",
    "trainer.micro_batch_size=16",
    "schedule=constant",
    "evaluate.samples=0",
    "run.export=none",
]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Commands:
    folder = tmp_path_factory.mktemp("environments")
    rows = [{"prompt": "go", "n": n} for n in range(64)]
    save_model(
        folder / "model",
        [{"prompt": f"go user assistant tool tools peek {call_of('peek')} {' '.join(WORDS)}"}],
        decoder=True,
    )
    (folder / "model" / "chat_template.jinja").write_text(TEMPLATE)
    (folder / "prompts.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (folder / "hidden.py").write_text(HIDDEN)
    return Commands(folder)


def train(workplace: Commands, name: str, *further: str):
    done = workplace.run("train", *RUN, f"run.dir={name}", *further, timeout=1500)
    assert done.returncode == 0, done.stderr[-3000:]
    return [row for row in metrics(workplace.folder / name) if "reward" in row]


def rollouts(folder) -> list[dict]:
    return [json.loads(line) for path in sorted(folder.iterdir()) for line in path.read_text().splitlines()]


def test_two_ranks_act_in_step_and_apart_alike(workplace):
    """The same completions of the first step, on one rank, on two, and with partitioned weights."""
    settings = ["trainer.max_steps=1", "trainer.global_batch_size=4", "task.samples=3", "evaluate.every=0"]
    settings += ["trainer.micro_batch_size=2"]
    train(workplace, "one", "launch.processes=1", *settings)
    train(workplace, "two", "launch.processes=2", "zero=stage2", *settings)
    one, two = (rollouts(workplace.folder / name / "rollouts") for name in ("one", "two"))
    assert [row["ids"] for row in one] == [row["ids"] for row in two]
    assert [row["prompt_ids"] for row in one] == [row["prompt_ids"] for row in two]


@pytest.mark.slow
def test_it_learns_to_look_before_it_answers(workplace):
    settings = ["optimizer.lr=5e-3", "trainer.global_batch_size=16", "trainer.max_steps=200", "evaluate.every=100"]
    rows = train(workplace, "learns", *settings)
    last = rows[-5:]
    means = [sum(row["reward"] for row in rows[start : start + 5]) / 5 for start in range(0, 200, 20)]
    assert means[0] < 0.2, means
    # A completion that has not looked scores nothing, and 0.39 is what always the same word would score behind a look.
    assert sum(row["reward"] for row in last) / 5 > 0.45, means
    assert sum(row["tools/call_frequency"] for row in last) / 5 > 0.45
    assert max(row["sampling/sampling_logp_difference/max"] for row in rows) < 1e-2
