"""Reinforcement from the command line: it learns, survives being killed anywhere, and refuses what it cannot do."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest
from support.command import Commands, exact, metrics, result

from dstune.testing.tiny import save_model

WORDS = [f"w{number}" for number in range(16)]
REPEATS = '''
import dstune

@dstune.reward
class Repeats(dstune.Reward):
    """Share of the 8 words that are the one that the prompt names."""

    name = "repeats"
    columns = ("word",)

    def __call__(self, prompts, completions, completion_ids, **columns):
        return [text.split().count(word) / 8 for text, word in zip(completions, columns["word"])]
'''
RUN = [
    "task=reinforcement",
    "model.path=model",
    "data.train=prompts.jsonl",
    "plugins=[./repeats.py]",
    "task.rewards=[repeats]",
    "task.max_new_tokens=8",
    "task.samples=8",
    "optimizer.lr=3e-3",
    "schedule=constant",
    "trainer.micro_batch_size=8",
    "trainer.global_batch_size=8",
    "evaluate.samples=0",
]


LEARNING = [
    "method=full",
    "model.weights=random",
    "trainer.precision=fp32",
    "model.config_overrides={initializer_range:0.1}",
    "optimizer.lr=5e-3",
    "trainer.global_batch_size=16",
    "trainer.max_steps=120",
    "evaluate.every=60",
    "data.clean.leaks=false",  # held-out rows name the same words: a tiny model has not learned to repeat any other
    "run.export=none",
]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Commands:
    folder = tmp_path_factory.mktemp("reinforcement")
    rows = [{"prompt": WORDS[n % 16], "word": WORDS[n % 16], "n": n} for n in range(160)]
    save_model(folder / "model", rows, decoder=True)
    (folder / "model" / "chat_template.jinja").unlink()  # a prompt is its words alone
    (folder / "prompts.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (folder / "repeats.py").write_text(REPEATS)
    return Commands(folder)


def train(workplace: Commands, name: str, *further: str):
    return workplace.run("train", *RUN, f"run.dir={name}", *further, timeout=900)


def rollouts(run: Path) -> dict[str, list[dict]]:
    return {
        path.name: [json.loads(line) for line in path.read_text().splitlines()]
        for path in sorted((run / "rollouts").iterdir())
    }


def test_it_learns_to_say_the_word_that_the_prompt_names(workplace):
    done = train(workplace, "learns", *LEARNING)
    assert done.returncode == 0, done.stderr
    rows = [row for row in metrics(workplace.folder / "learns") if "reward" in row]
    assert rows[0]["reward"] < 0.15
    assert sum(row["reward"] for row in rows[-5:]) / 5 > 0.95
    assert max(row["sampling/sampling_logp_difference/max"] for row in rows) < 1e-4
    assert result(workplace.folder / "learns")["eval_final"]["reward"] > 0.9, "of one sample of held-out prompts"


@pytest.mark.parametrize("method", ["full", "lora"])
def test_killed_anywhere_it_goes_on_with_the_same_bits(workplace, method):
    """SIGKILL to the whole run at random times: in a rollout, a reward, an update or a save."""
    settings = [f"method={method}", "zero=stage2", "launch.processes=2", "trainer.max_steps=12", "evaluate.every=6"]
    settings += ["checkpoint.every=3", "task.updates=2"]
    whole, cut = workplace.folder / f"{method}-whole", workplace.folder / f"{method}-cut"
    done = train(workplace, whole.name, *settings)
    assert done.returncode == 0, done.stderr
    chance, kills = random.Random(method), 0
    for _ in range(20):
        seen = len(list((cut / "rollouts").glob("*"))) if cut.exists() else 0
        process = workplace.start("train", *RUN, f"run.dir={cut.name}", *settings)
        while process.poll() is None and len(list((cut / "rollouts").glob("*"))) <= min(seen, 10):
            time.sleep(0.02)
        time.sleep(chance.uniform(0, 1.5))
        if process.poll() is None and kills < 5:
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        process.wait(timeout=300)
        if process.returncode == 0:
            break
    assert process.returncode == 0, workplace.log
    assert kills >= 3
    assert rollouts(cut) == rollouts(whole)
    name = "model.safetensors" if method == "full" else "adapter_model.safetensors"
    assert (cut / "export" / name).read_bytes() == (whole / "export" / name).read_bytes()
    assert exact(cut)[-1]["eval/reward"] == exact(whole)[-1]["eval/reward"]


def test_what_cannot_be_done_is_refused_with_the_key(workplace):
    for key, wrong in {
        "task.rewards": ["task.rewards=[repeat]"],
        "task.reward_weights": ["task.reward_weights=[1,2]"],
        "task.kl.coefficient": ["task.kl.coefficient=0.1", "method=lora", "method.init=pissa"],
        "task.clip_low": ["task.clip_low=0.1"],
        "data.packing": ["data.packing=true"],
        "trainer.micro_batch_size": ["trainer.micro_batch_size=auto"],
        "task.replay": ["task.replay=nowhere"],
    }.items():
        done = train(workplace, "refused", "method=full", *wrong)
        assert done.returncode == 2, (key, done.stdout, done.stderr)
        assert f"{key}=" in done.stderr, (key, done.stderr)


def test_a_reward_that_can_score_nothing_ends_the_run_with_its_reason(workplace):
    done = train(workplace, "mute", "task.rewards=[number]", "trainer.max_steps=2", "method=full")
    assert done.returncode == 2, done.stderr
    assert "'number' could score no completion" in done.stderr
    assert "answer" in done.stderr


JUDGED = '''
import dstune

@dstune.reward
def judged(prompts, completions, n, trainer_state, **columns):
    """A judge that is down in the evaluations before step 4, and gives -5 or less."""
    if trainer_state.global_step < 4 and len(set(n)) == len(n):
        raise ConnectionError("the judge is down")
    return [-5.0 - len(text) / 1000 for text in completions]
'''


def test_a_reward_that_fails_in_an_evaluation_is_no_score_of_zero(workplace):
    (workplace.folder / "judged.py").write_text(JUDGED)
    few = ["method=full", "trainer.max_steps=4", "launch.processes=1", "evaluate.every=2", "plugins=[./judged.py]"]
    few += ["task.rewards=[judged]", "data.clean.leaks=false", "task.reward_retry_seconds=0"]
    done = train(workplace, "judged", *few)
    assert done.returncode == 0, done.stderr
    rows = [row for row in metrics(workplace.folder / "judged") if "eval/rewards/judged/failed" in row]
    assert [row["eval/rewards/judged/failed"] for row in rows] == [1, 1, 0]
    assert ["eval/reward" in row for row in rows] == [False, False, True]
    assert ["eval/rewards/judged/mean" in row for row in rows] == [False, False, True]
    ended = result(workplace.folder / "judged")
    assert ended["best"]["step"] == 4 and ended["best"]["value"] < -5
    assert "completions are left out of eval/reward" in done.stdout + done.stderr
    assert "ConnectionError: the judge is down" in done.stdout + done.stderr
    done = workplace.run("evaluate", "judged", "--json", timeout=600)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["metrics"]["reward"] < -5, "the trained weights, with the steps of the run"


OUTAGE = """
import os
import dstune

@dstune.reward
def served(prompts, completions, n, word, trainer_state, **columns):
    if trainer_state.global_step >= 2 and os.path.exists("down"):
        raise ConnectionRefusedError("the judge is down")
    return [float(text.split().count(right)) for text, right in zip(completions, word)]

@dstune.reward
def early(prompts, completions, trainer_state, **columns):
    return [0.5 if trainer_state.global_step < 1 else None for _ in completions]
"""


def test_a_judge_that_stays_down_saves_the_run_which_continues_with_the_same_bits(workplace):
    (workplace.folder / "outage.py").write_text(OUTAGE)
    few = ["method=full", "trainer.max_steps=4", "launch.processes=2", "evaluate.every=0", "plugins=[./outage.py]"]
    few += ["task.rewards=[served,early]", "task.reward_retry_seconds=1", "checkpoint.every=100"]
    assert train(workplace, "outage-whole", *few).returncode == 0
    (workplace.folder / "down").touch()
    done = train(workplace, "outage", *few)
    (workplace.folder / "down").unlink()
    assert done.returncode == 1, done.stderr
    said = done.stdout + done.stderr
    assert "ConnectionRefusedError: the judge is down" in said
    assert "task.reward_retry_seconds" in said and "step 2 is saved" in said
    assert "continue with: dstune train" in said
    assert result(workplace.folder / "outage")["status"] == "failed"
    done = workplace.run("train", "outage", timeout=600)
    assert done.returncode == 0, done.stderr
    whole, cut = workplace.folder / "outage-whole", workplace.folder / "outage"
    assert rollouts(cut) == rollouts(whole)
    name = "model.safetensors"
    assert (cut / "export" / name).read_bytes() == (whole / "export" / name).read_bytes()
    rows = [row for row in metrics(whole) if "reward" in row]
    assert ["rewards/early/mean" in row for row in rows] == [True, False, False, False], "None for whole steps"
    assert [row["rewards/early/failed"] for row in rows] == [0, 0, 0, 0]


def test_graders_score_in_training_and_evaluation_and_are_not_believed_of_strangers(workplace):
    check = {"type": "string_check", "operation": "like", "input": "{{ sample.output_text }}"}
    for name, reference in (("named", "{{ item.word }}"), ("any", "w")):
        (workplace.folder / f"{name}.json").write_text(json.dumps({**check, "name": name, "reference": reference}))
    few = ["method=full", "trainer.max_steps=2", "launch.processes=1", "evaluate.every=0", "task.graders=[named.json]"]
    done = train(workplace, "graded", *few, "task.reward_weights=[1,2]", "task.rollout=fast")
    assert done.returncode == 0, done.stderr
    row = next(row for row in metrics(workplace.folder / "graded") if "reward" in row)
    assert row["reward"] == pytest.approx(row["rewards/repeats/mean"] + 2 * row["rewards/named/mean"], rel=1e-6)
    assert row["sampling/importance_sampling_ratio/mean"] == pytest.approx(1, abs=1e-4)
    done = workplace.run("evaluate", "graded", "--grader", "any.json", "--json", timeout=600)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["metrics"]
    assert 0 <= found["rewards/any/mean"] <= 1
    assert "rewards/named/mean" not in found
    stored = workplace.folder / "graded" / "run.yaml"
    stored.write_text(stored.read_text().replace("named.json", "any.json"))
    done = workplace.run("train", "graded", "trainer.max_steps=3", timeout=600)
    assert done.returncode == 2, done.stdout
    assert "task.graders" in done.stderr


def test_a_reward_of_a_run_from_elsewhere_is_refused(workplace, monkeypatch):
    few = ["method=full", "trainer.max_steps=1", "launch.processes=1", "evaluate.every=0", "run.export=none"]
    assert train(workplace, "elsewhere", *few).returncode == 0
    plugin = next((workplace.folder / "elsewhere" / "plugins").rglob("*.py"))
    plugin.write_text(plugin.read_text() + "\nraise RuntimeError('it runs')\n")
    done = workplace.run("train", "elsewhere", "trainer.max_steps=2", timeout=600)
    assert done.returncode == 2, done.stdout
    assert "it runs" not in done.stderr
