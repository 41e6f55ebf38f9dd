"""A data set of the hub from the command line, with a hub on loopback: commit, cache, continued offline, refusals."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from support.command import Commands, metrics
from support.hub_server import Hub, environment, serving
from support.sources import CHATS
from support.tiny import save_decoder

FIRST, SECOND = "a" * 40, "b" * 40
BASE = [
    "model.path=model",
    "data.max_length=64",
    "evaluate.every=0",
    "checkpoint.every=0",
    "launch.processes=1",
    "run.export=none",
    "evaluate.at_start=false",
]


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serving() as server:
        yield server


@pytest.fixture
def workplace(tmp_path: Path, hub: Hub) -> Commands:
    save_decoder(tmp_path / "model")
    commands = Commands(tmp_path)
    commands.env.update(environment(hub, tmp_path / "home"))
    return commands


def repository(folder: Path, rows: int) -> Path:
    """Splits `train_sft` (in two shards) and `test_sft`, as `push_to_hub` names them."""
    (folder / "data").mkdir(parents=True)
    half = rows // 2
    for name, part in (
        ("train_sft-00000-of-00002", CHATS[:half]),
        ("train_sft-00001-of-00002", CHATS[half:rows]),
        ("test_sft-00000-of-00001", CHATS[:4]),
    ):
        pq.write_table(pa.Table.from_pylist(part), folder / "data" / f"{name}.parquet")
    return folder


def data_of(run_dir: Path) -> dict:
    return yaml.safe_load((run_dir / "run.yaml").read_text())["config"]["data"]


def test_a_run_stays_at_its_commit_and_continues_offline(workplace: Commands, hub: Hub) -> None:
    folder = workplace.folder
    hub.publish("org/chats", repository(folder / "first", 24), FIRST)
    train = ["data.train=org/chats:train_sft", "data.validation=org/chats:test_sft", "run.dir=runs/hub"]
    done = workplace.run("train", *BASE, *train, "trainer.max_steps=2")
    assert done.returncode == 0, done.stderr + done.stdout
    assert f"data set org/chats at commit {FIRST[:12]}" in done.stderr
    run_dir = folder / "runs" / "hub"
    data = data_of(run_dir)
    assert (data["train"], data["revision"], data["subset"]) == ("org/chats:train_sft", FIRST, "default")
    report = json.loads((run_dir / "data_report.json").read_text())
    assert (report["train"]["rows_read"], report["validation"]["rows_read"]) == (24, 4)
    # The branch moves on, and then the hub is gone: the run goes on with the rows that it began with.
    hub.publish("org/chats", repository(folder / "second", 16), SECOND)
    workplace.env["HF_HUB_OFFLINE"] = "1"
    request_count = len(hub.requested)
    done = workplace.run("train", "runs/hub", "trainer.max_steps=3")
    assert done.returncode == 0, done.stderr + done.stdout
    assert len(hub.requested) == request_count
    assert "the run has 3 steps now instead of 2, and its schedule is stretched" in done.stdout
    assert [row["step"] for row in metrics(run_dir) if "loss" in row] == [1, 2, 3]
    assert data_of(run_dir)["revision"] == FIRST


def test_what_the_hub_and_its_absence_answer(workplace: Commands, hub: Hub) -> None:
    """Every refusal ends with exit code 2 and says what to do."""
    hub.publish("org/chats", repository(workplace.folder / "first", 24), FIRST)
    hub.publish("org/closed", workplace.folder / "first", FIRST)
    hub.gated.add("org/closed")
    (workplace.folder / "script").mkdir()
    (workplace.folder / "script" / "script.py").write_text("import datasets")
    hub.publish("org/script", workplace.folder / "script", FIRST)
    several = workplace.folder / "several"
    configurations = [{"config_name": name, "data_files": f"{name}.jsonl"} for name in ("english", "german")]
    several.mkdir()
    (several / "README.md").write_text(f"---\nconfigs: {json.dumps(configurations)}\n---\n")
    for name in ("english", "german"):
        (several / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in CHATS))
    hub.publish("org/several", several, FIRST)
    cases: dict[str, tuple[dict[str, str], tuple[str, str]]] = {
        "absent": ({"train": "org/absent"}, ("data.train=org/absent", "the hub has no such data set")),
        "gated": ({"train": "org/closed"}, ("data.train=org/closed", "access to this data set has to be granted")),
        "script": ({"train": "org/script"}, ("data.train=org/script", "data.revision=refs/convert/parquet")),
        "revision": ({"train": "org/chats", "revision": "v9"}, ("data.revision=v9", "org/chats has no such revision")),
        "subset": ({"train": "org/several"}, ("data.subset=null", "english, german are there")),
        "misspelt": ({"train": "org/several", "subset": "germn"}, ("data.subset=germn", "data.subset=german")),
        "no hub": ({"train": "a.jsonl", "revision": "v1"}, ("data.revision=v1", "no rows come from the hub")),
    }
    resolutions = resolve(workplace, *(data for data, _ in cases.values()))
    for text, (name, (_, expected)) in zip(resolutions, cases.items(), strict=True):
        assert text.startswith("REFUSED"), (name, text)
        assert all(part in text for part in expected), (name, text)
    done = workplace.run("train", *BASE, "data.train=org/chats:train_stf", "run.dir=runs/refused")
    assert done.returncode == 2, done.stderr + done.stdout
    assert "Traceback" not in done.stderr
    assert "there is no split 'train_stf'" in done.stderr
    assert "data.train=org/chats:train_sft" in done.stderr
    assert not (workplace.folder / "runs").exists()


def test_offline_the_cache_serves_or_the_run_is_refused(workplace: Commands, hub: Hub) -> None:
    hub.publish("org/chats", repository(workplace.folder / "first", 24), FIRST)
    hub.publish("org/other", repository(workplace.folder / "second", 16), SECOND)
    chats, here = {"train": "org/chats:train_sft"}, f"FOUND org/chats:train_sft None {FIRST} default"
    offline = workplace.env | {"HF_HUB_OFFLINE": "1"}
    online = workplace.env
    workplace.env = offline
    (refused,) = resolve(workplace, chats)
    assert "REFUSED" in refused and "HF_HUB_OFFLINE is set" in refused
    workplace.env = online
    found, both = resolve(workplace, chats, chats | {"validation": "org/other:test_sft"})
    assert here in found
    # Parts from two repositories have their commits in their paths.
    assert f"FOUND org/chats@{FIRST}:train_sft org/other@{SECOND}:test_sft None None" in both
    workplace.env = offline
    found, refused = resolve(workplace, chats, {"train": "org/chats", "revision": "v2"})
    assert here in found
    assert f"org/chats@{FIRST} is in the cache" in refused
    # No connection is as good as none wanted.
    workplace.env = online | {"HF_ENDPOINT": "http://127.0.0.1:9"}
    found, refused = resolve(workplace, chats, {"train": "org/unknown"})
    assert "the hub cannot be reached; using org/chats as cached" in found
    assert here in found
    assert "REFUSED" in refused and "the hub cannot be reached" in refused


RESOLVE = """
import json, sys
from dstune.config.data_schema import DataConfig
from dstune.core.errors import UserError
from dstune.launch.hub_data import resolve
for given in json.loads(sys.argv[1]):
    said = []
    try:
        data = resolve(DataConfig(**given), said.append)
        print("ANSWER", json.dumps(f"FOUND {data.train} {data.validation} {data.revision} {data.subset} {said}"))
    except UserError as error:
        print("ANSWER", json.dumps(f"REFUSED {error}"))
"""


def resolve(workplace: Commands, *data: dict[str, str]) -> list[str]:
    """What resolving each of these `data` sections says, all in one process."""
    done = workplace.run(json.dumps(data), program=(sys.executable, "-c", RESOLVE))
    assert done.returncode == 0, done.stderr
    return [json.loads(line.removeprefix("ANSWER ")) for line in done.stdout.splitlines() if line.startswith("ANSWER ")]
