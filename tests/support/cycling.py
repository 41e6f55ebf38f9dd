"""A model that is served, monitored and trained again by the commands of a user, and what is measured of it."""

from __future__ import annotations

import json
import random
import re
import shlex
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2

from dstune.cycle import training
from tests.support import topics
from tests.support.command import Commands, family_of

CLIENTS = ("web", "app", "desk", "mail", "shop", "kiosk")
FIRST, ARRIVING = topics.TOPICS[0], topics.TOPICS[1:]
TRAINING = (
    *("launch.processes=1", "launch.in_process=true", "trainer.precision=fp32", "run.export=none"),
    *("trainer.global_batch_size=32", "trainer.micro_batch_size=32", "optimizer.lr=3e-3"),
    *("evaluate.every=1000", "evaluate.at_start=false", "checkpoint.every=20"),
)
USERS = 90
"""Of each topic, whose requests come in turn."""
Say = Callable[[str], None]


class Place(Commands):
    """A folder in which commands run, with its rows, its runs and its cycles."""

    def __init__(self, folder: Path, say: Say):
        super().__init__(folder)
        self.say = say

    def succeed(self, *words: str, code: int = 0) -> str:
        """Run a command. Returns what it printed."""
        self.say(f"$ dstune {shlex.join(words)}")
        done = self.run(*words, timeout=1200)
        assert done.returncode == code, f"{words}: {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        return str(done.stdout)

    def train(self, name: str, rows: Sequence[Mapping[str, Any]], *overrides: str, held_out: float = 0.25) -> Path:
        """Train a classifier on rows, a share of them held out, from the encoder of random weights."""
        if not (self.folder / "model").is_dir():
            topics.save_encoder(self.folder / "model")
        topics.write(self.folder / f"{name}.jsonl", rows)
        self.succeed(
            *("train", "task=classification", "task.labels=[good,bad]", "model.path=model", "data=files"),
            *(f"data.train={name}.jsonl", "data.columns={text: text, label: label}", "data.max_length=32"),
            *(f"data.split.validation={held_out}", f"run.dir={name}", f"run.name={name}", *TRAINING, *overrides),
        )
        return self.folder / name

    def configure(self, run: str, data: str, folder: str = "cycle", **changes: Any) -> str:
        """Write the file of a cycle. Returns its name."""
        content = {
            "run": run,
            "folder": folder,
            "data": data,
            "alias": "assistant",
            "overrides": [*TRAINING],
            **changes,
        }
        (self.folder / f"{folder}.yaml").write_text(json.dumps(content))
        return f"{folder}.yaml"

    def cycle(self, config: str, *words: str) -> dict[str, Any]:
        """`dstune cycle CONFIG ...`: what it decided, and how things stand."""
        result: dict[str, Any] = json.loads(self.succeed("cycle", config, *words, "--json").splitlines()[-1])
        return result


# -- a server and its clients


@contextmanager
def server(place: Place, *words: str) -> Iterator[str]:
    """`dstune serve`, asked to end after the block, which writes its logs. Gives its address."""
    words = ("serve", *words, "--port", "0", "--state", "serving", "--threads", "1")
    place.say(f"$ dstune {shlex.join(words)} &")
    process = place.start(*words)
    try:
        end = time.monotonic() + 900
        while not (found := re.search(r"^(http://\S+?)/\S*  serves", place.log, re.MULTILINE)):
            assert process.poll() is None and time.monotonic() < end, place.log[-4000:]
            time.sleep(0.2)
        yield found[1]
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 0, place.log[-4000:]


class Clients:
    """Those of a server, each with a key of its own."""

    def __init__(self, place: Place, names: Sequence[str] = CLIENTS):
        words = ("--state", "serving", "--json")
        self._keys = {name: json.loads(place.succeed("serve-keys", "add", name, *words))["key"] for name in names}
        self._admin = json.loads(place.succeed("serve-keys", "add", "operator", "--admin", *words))["key"]

    def ask(self, url: str, rows: Sequence[Mapping[str, Any]], labelled: float = 0.0) -> Counter[str]:
        """Ask each row, and say the right label of a share of them. Returns how often each version answered."""
        versions: Counter[str] = Counter()
        names, choose = [*self._keys], random.Random(0)
        with httpx2.Client(base_url=url, timeout=60) as client:
            for number, row in enumerate(rows):
                headers = {"Authorization": f"Bearer {self._keys[names[number % len(names)]]}"}
                user = row.get("user", f"{row['topic']}-{number % USERS}")
                body = {"model": "assistant", "input": row["text"], "user": user}
                answer = client.post("/classify", json=body, headers=headers).raise_for_status()
                versions[answer.json()["model"]] += 1
                if choose.random() < labelled:
                    said = {"id": answer.headers["x-request-id"], "label": row["label"]}
                    client.post("/v1/feedback", json=said, headers=headers).raise_for_status()
        return versions

    def forget(self, url: str, user: str) -> int:
        """Delete all that is kept of a user. Returns how many answers there were."""
        headers = {"Authorization": f"Bearer {self._admin}"}
        answer = httpx2.delete(f"{url}/admin/users/{user}", headers=headers, timeout=60).raise_for_status()
        return int(answer.json()["answers"])


# -- from a fine-tune to a rollback


def story(folder: Path, say: Say) -> dict[str, Any]:
    """One life of a model, each step of it a command: see `benchmarks/cycle.py`. Returns what was seen."""
    place, seen = Place(folder, say), {}
    run = place.train("first", topics.reviews(FIRST, 1200, 0), "trainer.max_steps=80")
    clients = Clients(place)
    topics.write(folder / "frozen.jsonl", topics.reviews(FIRST, 400, 1) + topics.reviews(ARRIVING[0], 400, 1))
    canaries = [
        {"text": "witty witty moving plot", "expected": "good"},
        {"text": "tedious wooden script", "expected": "bad"},
    ]
    topics.write(folder / "canaries.jsonl", canaries)
    gates = {"tests": ["frozen.jsonl"], "slices": ["topic"], "canaries": "canaries.jsonl", "margin": 0.03}
    # At the rate of a first training, and half of the rows old ones, the candidate loses what it knew, and is refused.
    steps = [*(word for word in TRAINING if "lr=" not in word), "optimizer.lr=1e-3", "trainer.max_steps=200"]
    settings = {"share": 0.25, "gates": gates, "least_rows": 100, "replay": 0.8, "overrides": steps}
    config = place.configure("first", "serving", **settings)
    monitor = ("monitor", str(run), "--data", "serving", "--window", "1h", "--fail-on-drift", "--json", "--checks", "2")

    with server(place, "assistant=first", "--log-requests") as url:
        clients.ask(url, topics.reviews(FIRST, 300, 2))
    quiet = json.loads(place.succeed(*monitor).splitlines()[-1])
    seen["before"] = {"verdict": quiet["verdict"], "exit code": 0, "rows": quiet["rows"]["live"]}
    say(f"monitor: {quiet['verdict']}: {quiet['reason']}")
    seen["without labels"] = place.cycle(config)["ledger"][-1]["reason"]

    with server(place, "v1=cycle/versions/v1", "--aliases", "cycle", "--log-requests", "--require-proof") as url:
        parcels = topics.reviews(ARRIVING[0], 500, 3)
        clients.ask(url, parcels, labelled=0.8)
        seen["forgotten answers"] = clients.forget(url, f"{ARRIVING[0]}-7")
    drift = json.loads(place.succeed(*monitor, code=3).splitlines()[-1])
    seen["after"] = {"verdict": drift["verdict"], "exit code": 3, "words": drift["clusters"][0]["words"]}
    say(f"monitor: {drift['verdict']}: {drift['reason']}")

    result = place.cycle(config)
    seen["cycle"] = {line["step"]: line["reason"] for line in result["ledger"] if line["cycle"] == 2}
    seen["shares"] = result["aliases"]["assistant"]
    say(f"cycle: {result['decision']}: {seen['cycle']}")
    texts = {row["text"] for file in (folder / "cycle").glob("cycles/*/train.jsonl") for row in read_lines(file)}
    seen["forgotten rows in training"] = sum(row["text"] in texts for row in parcels[7::USERS])
    challenger = result["challenger"]
    versions = ("v1=cycle/versions/v1", f"{challenger}=cycle/versions/{challenger}")
    crowd = [row | {"user": f"visitor {number}"} for number, row in enumerate(topics.reviews(ARRIVING[0], 400, 4))]
    with server(place, *versions, "--aliases", "cycle", "--log-requests", "--require-proof") as url:
        seen["answers while it challenges"] = dict(clients.ask(url, crowd))
        place.succeed("cycle", config, "promote", "--by", "ann", "--reason", "read 50 answers")
        seen["answers after promote"] = dict(clients.ask(url, crowd[:40]))
        place.succeed("cycle", config, "rollback", "--by", "ann")
        seen["answers after rollback"] = dict(clients.ask(url, crowd[:40]))
    seen["decisions"] = [(line["cycle"], line["step"], line["decision"]) for line in read_ledger(folder / "cycle")]
    return seen


def read_ledger(folder: Path) -> list[dict[str, Any]]:
    return read_lines(folder / "ledger.jsonl")


# -- killed while it works


def killed(folder: Path, count: int, say: Say, seed: int = 0) -> list[dict[str, Any]]:
    """Kill cycles with real trainings at `count` random moments, each cycle twice, go on, and compare with one that nobody killed.

    The first time its training goes with it; the second time the training is left alone, as where the memory killer takes one
    process.
    """
    place, choose = Place(folder, say), random.Random(seed)
    place.train("first", topics.reviews(FIRST, 1200, 0), "trainer.max_steps=80")
    topics.write(folder / "feedback.jsonl", topics.feedback(ARRIVING[0], 400, 1, keys=CLIENTS))

    def configured(name: str) -> str:
        return place.configure("first", "feedback.jsonl", name, overrides=[*TRAINING, "trainer.max_steps=60"])

    began = time.monotonic()
    assert place.cycle(configured("whole"))["decision"] == "challenges"
    seconds, expected = time.monotonic() - began, state_of(folder / "whole")
    say(f"a cycle takes {seconds:.1f} s")
    found = []
    for number in range(count):
        name = f"killed-{number // 2}"
        config, moment = configured(name), choose.uniform(0.02, 0.6) * seconds
        cycle = folder / name / "cycles" / "0001"
        if (cycle / "done.json").is_file():
            continue
        process = place.start("cycle", config)
        try:
            process.wait(moment)
        except subprocess.TimeoutExpired:
            family = [] if number % 2 else family_of(process.pid)
            process.kill()
            for child in family:
                child.kill()
            process.wait()
        behind = sorted(file.stem for file in cycle.glob("*.json"))
        behind += sorted(file.name for file in cycle.glob("run/checkpoints/step-*"))[-1:]
        found.append({"after": round(moment, 1), "behind": behind})
        say(f"{name}: killed after {moment:.1f} s, behind {behind}")
        if number % 2 or number == count - 1:
            if not (cycle / "done.json").is_file():
                place.cycle(config)
            is_same = state_of(folder / name) == expected
            found[-1]["same"] = is_same
            say(f"{name}: {'the same' if is_same else 'NOT THE SAME'}")
    return found


def state_of(folder: Path) -> dict[str, Any]:
    """Ledger, registry, rows and weights, without the folder's name and the times."""
    texts = {
        str(file.relative_to(folder)): re.sub(r', "time": "[^"]*"', "", file.read_text().replace(str(folder), "FOLDER"))
        for pattern in ("*.json*", "rows/*", "cycles/*/*.json*")
        for file in folder.glob(pattern)
    }
    return texts | {version.name: training.weights_digest(version) for version in (folder / "versions").iterdir()}


def read_lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]
