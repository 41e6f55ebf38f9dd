"""A run that is killed at twenty places, in rollouts, rewards, updates and saves, ends like one that was not, to the bit."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest
from support.command import Commands, exact

from dstune.testing.tiny import save_model

PLACES = {
    "rollout": ("dstune.tasks.reinforcement.sampling:draw", (1, 5, 9, 14, 22)),
    "reward": ("dstune.tasks.reinforcement.scoring:Scorer.score", (1, 2, 3, 4)),
    "record": ("dstune.tasks.reinforcement.rollout:write_records", (1, 2, 4)),
    "update": ("dstune.zero.engine:Engine.update", (1, 2, 3, 5)),
    "backward": ("dstune.zero.engine:Engine.accumulate", (2, 7)),
    "save": ("dstune.checkpoint.saves:Saves.save", (1, 2)),
}
"""What is called, and before which of its calls the rank is killed."""
KILLER = """
import importlib, json, os, signal
from pathlib import Path
import dstune

@dstune.callback
class Killer(dstune.Callback):
    name = "killer"

    def on_train_begin(self, run):
        order = Path(run.run_dir).parent / "order.json"
        if not order.exists():
            return
        target, number = json.loads(order.read_text())
        module, _, path = target.partition(":")
        owner = importlib.import_module(module)
        *owners, name = path.split(".")
        for part in owners:
            owner = getattr(owner, part)
        plain, calls = getattr(owner, name), []

        def killed(*arguments, **named):
            calls.append(1)
            if len(calls) == number and order.exists():
                order.unlink()
                os.kill(os.getpid(), signal.SIGKILL)
            return plain(*arguments, **named)

        setattr(owner, name, killed)

@dstune.reward
def says_its_word(prompts, completions, word, **kwargs):
    return [float(text.split().count(one)) for text, one in zip(completions, word)]
"""
WORDS = [f"w{number}" for number in range(12)]
RUN = [
    "task=reinforcement",
    "model.path=model",
    "data.train=prompts.jsonl",
    "plugins=[./killer.py]",
    "trainer.callbacks=[killer]",
    "task.rewards=[says_its_word]",
    "task.max_new_tokens=6",
    "task.samples=4",
    "task.updates=2",
    "optimizer.lr=3e-3",
    "schedule=constant",
    "trainer.micro_batch_size=8",
    "trainer.global_batch_size=4",
    "trainer.max_steps=4",
    "checkpoint.every=2",
    "evaluate.every=0",
    "evaluate.samples=0",
    "data.split.validation=0",
    "launch.processes=1",
]
CASES = [(place, number) for place, (_, numbers) in PLACES.items() for number in numbers]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Commands:
    folder = tmp_path_factory.mktemp("kills")
    rows = [{"prompt": WORDS[n % 12], "word": WORDS[n % 12], "n": n} for n in range(24)]
    save_model(folder / "model", rows, decoder=True)
    (folder / "model" / "chat_template.jinja").unlink()
    (folder / "prompts.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (folder / "killer.py").write_text(KILLER)
    return Commands(folder)


def train(workplace: Commands, name: str, method: str):
    return workplace.run("train", *RUN, f"method={method}", f"run.dir={name}", timeout=900)


@pytest.fixture(scope="module")
def undisturbed(workplace):
    """The run of a method that nothing disturbs, by the method's name."""

    @functools.cache
    def run(method: str) -> Path:
        done = train(workplace, f"{method}-whole", method)
        assert done.returncode == 0, done.stderr
        return workplace.folder / f"{method}-whole"

    return run


def recorded(run: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in sorted((run / "rollouts").iterdir())}


@pytest.mark.slow
@pytest.mark.parametrize(("place", "number"), CASES, ids=[f"{place}-{number}" for place, number in CASES])
def test_killed_there_it_ends_with_the_same_bits(workplace, undisturbed, place, number):
    method = ("full", "lora")[number % 2]
    whole, name = undisturbed(method), f"{method}-{place}-{number}"
    order = workplace.folder / "order.json"
    order.write_text(json.dumps([PLACES[place][0], number]))
    cut = train(workplace, name, method)
    assert cut.returncode != 0, "it was killed"
    assert not order.exists(), "at the place that was meant"
    done = train(workplace, name, method)
    assert done.returncode == 0, done.stderr
    run = workplace.folder / name
    assert recorded(run) == recorded(whole)
    file = "model.safetensors" if method == "full" else "adapter_model.safetensors"
    assert (run / "export" / file).read_bytes() == (whole / "export" / file).read_bytes()
    assert [row["loss"] for row in exact(run) if "loss" in row] == [
        row["loss"] for row in exact(whole) if "loss" in row
    ]


def test_there_are_twenty_places():
    assert len(CASES) == 20
