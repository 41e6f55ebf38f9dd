"""Prompts whose completions all score the same are replaced, alike on any ranks and after kills; the end of a completion costs; of
held-out prompts several completions are tried."""

from __future__ import annotations

import json
from itertools import groupby
from pathlib import Path

import pytest
from support.command import Commands, exact, metrics

from dstune.testing.tiny import save_model

WORDS = [f"w{number}" for number in range(12)]
PLUGIN = """
import json, os, signal
from pathlib import Path
import dstune
from dstune.tasks.reinforcement import rollout, scoring

@dstune.callback
class Killer(dstune.Callback):
    name = "killer"

    def on_train_begin(self, run):
        order = Path(run.run_dir).parent / "order.json"
        if not order.exists():
            return
        name, number = json.loads(order.read_text())
        owner = {"score": scoring.Scorer, "write_records": rollout}[name]
        plain, calls = getattr(owner, name), []

        def killed(*arguments, **named):
            calls.append(1)
            if len(calls) == number:
                order.unlink()
                os.kill(os.getpid(), signal.SIGKILL)
            return plain(*arguments, **named)

        setattr(owner, name, killed)

@dstune.reward
def early(prompts, completions, n, **kwargs):
    # Every third prompt is too easy, every third too hard.
    return [[1.0, 0.0, float(sum(map(len, text.split())) % 2)][number % 3] for number, text in zip(n, completions)]
"""
RUN = [
    "task=reinforcement",
    "model.path=model",
    "data.train=prompts.jsonl",
    "data.split.validation=0.15",
    "data.clean.leaks=false",
    "plugins=[./early.py]",
    "trainer.callbacks=[killer]",
    "task.rewards=[early]",
    "task.max_new_tokens=6",
    "task.samples=3",
    "optimizer.lr=3e-3",
    "schedule=constant",
    "trainer.precision=fp32",
    "trainer.micro_batch_size=6",
    "trainer.global_batch_size=5",
    "trainer.max_steps=4",
    "checkpoint.every=2",
    "evaluate.every=0",
    "evaluate.samples=0",
    "method=full",
]
REDRAWN = ["task.redraws=2"]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Commands:
    folder = tmp_path_factory.mktemp("redraws")
    rows = [{"prompt": f"{WORDS[n % 12]} {WORDS[n // 12]}", "n": n} for n in range(48)]
    save_model(folder / "model", rows, decoder=True)
    (folder / "model" / "chat_template.jinja").unlink()
    (folder / "prompts.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (folder / "early.py").write_text(PLUGIN)
    return Commands(folder)


def train(workplace: Commands, name: str, *further: str):
    done = workplace.run("train", *RUN, f"run.dir={name}", *further, timeout=900)
    assert done.returncode == 0, done.stderr
    return workplace.folder / name


def rollouts(run: Path) -> list[list[dict]]:
    files = sorted((run / "rollouts").iterdir())
    return [[json.loads(line) for line in file.read_text().splitlines()] for file in files]


def groups(rows: list[dict]) -> list[list[dict]]:
    return [list(group) for _, group in groupby(rows, key=lambda row: row["prompt"])]


def is_empty(group: list[dict]) -> bool:
    return len({row["reward"] for row in group}) == 1


@pytest.fixture(scope="module")
def one(workplace) -> Path:
    return train(workplace, "one", "launch.processes=1", *REDRAWN)


def test_groups_without_signal_are_replaced_within_the_budget(one):
    rows = [row for row in metrics(one) if "redraws/replaced" in row]
    for step, row in zip(rollouts(one), rows, strict=True):
        everything = groups(step)
        trained = [group for group in everything if not group[0].get("replaced")]
        replaced = [group for group in everything if group[0].get("replaced")]
        assert len(trained) == 5 and all(is_empty(group) for group in replaced)
        assert len({group[0]["prompt"] for group in everything}) == len(everything), (
            "no prompt is drawn twice in a step"
        )
        assert row["redraws/replaced"] == pytest.approx(len(replaced) / len(everything))
        assert row["redraws/without_signal"] == pytest.approx(sum(map(is_empty, trained)) / 5)
        assert row["frac_reward_zero_std"] == pytest.approx(sum(map(is_empty, everything)) / len(everything))
        assert all(completion["advantage"] == 0 for group in replaced for completion in group)
    assert sum(row["redraws/replaced"] for row in rows) > 0
    assert any(row["redraws/without_signal"] < row["frac_reward_zero_std"] for row in rows)


def test_two_ranks_replace_the_same_prompts(workplace, one):
    two = train(workplace, "two", "launch.processes=2", "zero=stage2", "trainer.max_steps=1", *REDRAWN)
    assert [(row["prompt"], row["ids"]) for row in rollouts(two)[0]] == [
        (row["prompt"], row["ids"]) for row in rollouts(one)[0]
    ]


def test_a_replay_trains_the_same(workplace, one):
    again = train(workplace, "again", "launch.processes=1", *REDRAWN, f"task.replay={one / 'rollouts'}")
    assert [row["loss"] for row in exact(again) if "loss" in row] == [
        row["loss"] for row in exact(one) if "loss" in row
    ]


def test_killed_between_draws_it_goes_on_with_the_same_bits(workplace, one):
    cut = workplace.folder / "cut"
    for order in (["score", 1], ["score", 2], ["score", 3], ["write_records", 1], ["score", 5], ["write_records", 2]):
        (workplace.folder / "order.json").write_text(json.dumps(order))
        done = workplace.run("train", *RUN, "run.dir=cut", "launch.processes=1", *REDRAWN, timeout=900)
        assert done.returncode != 0 and not (workplace.folder / "order.json").exists(), order
    train(workplace, "cut", "launch.processes=1", *REDRAWN)
    assert rollouts(cut) == rollouts(one)
    name = "export/model.safetensors"
    assert (cut / name).read_bytes() == (one / name).read_bytes()


def test_partitioned_weights_are_gathered_by_all_ranks_of_a_redraw(workplace):
    train(workplace, "partitioned", "launch.processes=2", "zero=stage3", "trainer.max_steps=2", *REDRAWN)


def test_the_end_of_a_completion_costs_and_several_are_tried_of_held_out_prompts(workplace):
    settings = ["launch.processes=2", "trainer.max_steps=1", "task.overlong_tokens=4", "evaluate.every=1"]
    run = train(workplace, "overlong", *settings, "task.evaluation_samples=4", "task.reward_weights=[1,0.5]")
    for row in rollouts(run)[0]:
        penalty = -max(0, len(row["ids"]) - 2) / 4
        assert row["rewards"]["overlong"] == pytest.approx(penalty)
        assert row["reward"] == pytest.approx(row["rewards"]["early"] + 0.5 * penalty)
    evaluations = [row for row in metrics(run) if "eval/pass_at_1" in row]
    for row in evaluations:
        assert row["eval/pass_at_1"] == pytest.approx(row["eval/rewards/early/mean"])
        rates = [row[f"eval/pass_at_{k}"] for k in (1, 2, 4)]
        assert rates == sorted(rates)
        assert row["eval/pass_at_2/low"] <= rates[1] <= row["eval/pass_at_2/high"]
    assert evaluations
