"""A run that is killed twenty times, in rollouts, rewards, updates and saves, ends like one that was not, to the bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.command import Commands, exact

from dstune.testing.tiny import save_model

PLACES = {
    "rollout": "dstune.generation.completions:draw",
    "reward": "dstune.tasks.reinforcement.scoring:Scorer.score",
    "record": "dstune.tasks.reinforcement.rollout:write_records",
    "update": "dstune.zero.engine:Engine.update",
    "backward": "dstune.zero.engine:Engine.accumulate",
    "save": "dstune.checkpoint.saves:Saves.save",
}
KILLS = [
    *(("rollout", number) for number in (1, 5, 9, 14, 22)),
    *(("reward", number) for number in (1, 2)),
    *(("record", number) for number in (1, 2)),
    *(("update", number) for number in (1, 2, 3)),
    *(("backward", number) for number in (2, 7)),
    ("save", 1),
    # Behind the save of every second step, so that the next launch begins there.
    ("reward", 3),
    ("reward", 4),
    ("record", 4),
    ("update", 5),
    ("save", 2),
]
"""Before which call of what, counted from the begin of each launch, the rank is killed; one launch after the other."""
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
    "trainer.max_steps=16",
    "checkpoint.every=2",
    "evaluate.every=0",
    "evaluate.samples=0",
    "data.split.validation=0",
    "launch.processes=1",
]


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


def recorded(run: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in sorted((run / "rollouts").glob("*.jsonl"))}


@pytest.mark.slow
@pytest.mark.timeout(3600)  # 22 launches
@pytest.mark.parametrize("method", ["full", "lora"])
def test_killed_twenty_times_it_ends_with_the_same_bits(workplace, method):
    assert len(KILLS) == 20
    done = train(workplace, f"{method}-whole", method)
    assert done.returncode == 0, done.stderr
    whole, run = workplace.folder / f"{method}-whole", workplace.folder / f"{method}-killed"
    order, expected = workplace.folder / "order.json", recorded(whole)
    for place, number in KILLS:
        order.write_text(json.dumps([PLACES[place], number]))
        cut = train(workplace, run.name, method)
        assert cut.returncode != 0, f"it was killed at {place} {number}"
        assert not order.exists(), f"at {place} {number}, as was meant"
        assert recorded(run).items() <= expected.items(), f"killed at {place} {number}"
    done = train(workplace, run.name, method)
    assert done.returncode == 0, done.stderr
    assert recorded(run) == expected
    file = "model.safetensors" if method == "full" else "adapter_model.safetensors"
    assert (run / "export" / file).read_bytes() == (whole / "export" / file).read_bytes()
    assert [row["loss"] for row in exact(run) if "loss" in row] == [
        row["loss"] for row in exact(whole) if "loss" in row
    ]
