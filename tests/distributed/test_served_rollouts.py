"""Runs whose completions a server writes: what it loses, the run does not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.command import Commands, exact, metrics, result
from support.rollout_server import RolloutServer

from dstune.testing.tiny import save_model

WORDS = [f"w{number}" for number in range(12)]
SAYS = """
import os, signal
from pathlib import Path
import dstune
from dstune.zero.engine import Engine

@dstune.callback
class Killer(dstune.Callback):
    # Before its third update.
    name = "killer"

    def on_train_begin(self, run):
        order = Path(run.run_dir).parent / "order"
        if not order.exists():
            return
        plain, calls = Engine.update, []

        def killed(*arguments, **named):
            calls.append(1)
            if len(calls) == 3:
                order.unlink()
                os.kill(os.getpid(), signal.SIGKILL)
            return plain(*arguments, **named)

        Engine.update = killed

@dstune.reward
def says_its_word(prompts, completions, word, **kwargs):
    return [float(text.split().count(one)) for text, one in zip(completions, word)]
"""
RUN = [
    "task=reinforcement",
    "task.rollout=vllm",
    "model.path=model",
    "data.train=prompts.jsonl",
    "plugins=[./says.py]",
    "trainer.callbacks=[killer]",
    "task.rewards=[says_its_word]",
    "task.max_new_tokens=6",
    "task.samples=4",
    "optimizer.lr=3e-3",
    "schedule=constant",
    "trainer.precision=fp32",
    "trainer.micro_batch_size=8",
    "trainer.global_batch_size=4",
    "trainer.max_steps=3",
    "evaluate.every=0",
    "evaluate.samples=0",
    "data.split.validation=0",
]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Commands:
    folder = tmp_path_factory.mktemp("served")
    rows = [{"prompt": WORDS[n % 12], "word": WORDS[n % 12], "n": n} for n in range(24)]
    save_model(folder / "model", rows, decoder=True)
    (folder / "model" / "chat_template.jinja").unlink()
    (folder / "prompts.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (folder / "says.py").write_text(SAYS)
    return Commands(folder)


@pytest.fixture(scope="module")
def server(workplace):
    with RolloutServer(workplace.folder / "model") as server:
        yield server


def train(workplace: Commands, server: RolloutServer, name: str, *further: str):
    address = f"task.rollout_url={server.address}"
    return workplace.run("train", *RUN, address, f"run.dir={name}", *further, timeout=900)


def recorded(run: Path) -> dict[str, list[dict]]:
    files = sorted((run / "rollouts").iterdir())
    return {path.name: [json.loads(line) for line in path.read_text().splitlines()] for path in files}


def test_nothing_is_lost_with_the_server(workplace, server):
    lora = ["method=lora", "launch.processes=1", "checkpoint.every=2"]
    done = train(workplace, server, "whole", *lora)
    assert done.returncode == 0, done.stderr
    whole = workplace.folder / "whole"
    rows = [row for row in metrics(whole) if "reward" in row]
    assert max(row["sampling/sampling_logp_difference/max"] for row in rows) < 1e-4
    assert all(row["sampling/importance_sampling_ratio/mean"] == pytest.approx(1, abs=1e-4) for row in rows)
    versions = [{row["version"] for row in of_step} for of_step in recorded(whole).values()]
    assert all(len(of_step) == 1 for of_step in versions), "one version has written all tokens of a step"
    assert len(set.union(*versions)) == 3, "and another one those of the next"

    server.restart()
    server.requests.clear()
    server.gone_after = 9  # of four prompts a step: in the third step
    done = train(workplace, server, "cut", *lora, "task.rollout_seconds=2")
    assert done.returncode == 75, (done.stdout, done.stderr)
    cut = workplace.folder / "cut"
    assert result(cut)["steps"] == 2 and "did not answer" in str(result(cut))
    server.gone_after = None
    server.restart()
    server.failures = 2
    done = train(workplace, server, "cut", *lora)
    assert done.returncode == 0, done.stderr
    assert recorded(cut) == recorded(whole)
    adapter = "export/adapter_model.safetensors"
    assert (cut / adapter).read_bytes() == (whole / adapter).read_bytes()

    # Killed behind its rollout, a run asks for no completion again, even where the server would write another one.
    server.restart()
    server.requests.clear()
    (workplace.folder / "order").touch()
    assert train(workplace, server, "killed", *lora).returncode not in (0, 2, 75)
    assert not (workplace.folder / "order").exists() and len(server.bodies("/v1/completions")) == 12
    server.fault = "temperature"
    done = train(workplace, server, "killed", *lora)
    server.fault = ""
    assert done.returncode == 0, done.stderr
    assert len(server.bodies("/v1/completions")) == 12
    killed = workplace.folder / "killed"
    assert recorded(killed) == recorded(whole)
    assert (killed / adapter).read_bytes() == (whole / adapter).read_bytes()


@pytest.mark.slow
def test_partitioned_weights_are_published_whole(workplace, server):
    server.restart()
    full = ["method=full", "launch.processes=2", "zero=stage3", "run.export=none"]
    done = train(workplace, server, "partitioned", *full)
    assert done.returncode == 0, done.stderr
    rows = [row for row in metrics(workplace.folder / "partitioned") if "reward" in row]
    assert max(row["sampling/sampling_logp_difference/max"] for row in rows) < 1e-4
    assert len(server.bodies("/collective_rpc")) >= 3
    assert [row["step"] for row in exact(workplace.folder / "partitioned") if "loss" in row] == [1, 2, 3]


def test_a_server_with_another_model_ends_the_run(workplace, server):
    server.restart()
    server.fault = "temperature"
    done = train(
        workplace, server, "other", "method=full", "launch.processes=1", "run.export=none", "optimizer.lr=1e-6"
    )
    server.fault = ""
    assert done.returncode == 2, done.stderr
    assert "It looks like temperature 0.7" in done.stderr, done.stderr
