"""`dstune monitor` and `dstune data shift` from the command line, and the gauges of a server."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path

import pytest

from dstune.cli import main
from dstune.config.run_file import read_run
from dstune.monitor.command import read_result
from dstune.monitor.conversations import Conversation
from dstune.monitor.gateway_routes import DriftGauges
from dstune.monitor.model_signals import measure
from dstune.serve import options
from dstune.serve.gateway.request_log import RequestLog
from tests.support.served_runs import save_run
from tests.support.serving import run as run_served
from tests.support.tiny import WORDS, save_decoder, save_encoder, write_dialogues, write_labelled

OTHERS = ["invoice", "refund", "payment", "account", "card", "bank", "transfer", "balance", "fee", "charge"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("monitored")
    rows = write_labelled(folder / "rows.jsonl", 400)
    model = save_encoder(folder / "model")
    return save_run(folder / "run", model, rows, "task=classification", labels=("left", "right"))


def write_rows(path: Path, count: int, *, other: float = 0.0, seed: int = 1) -> Path:
    """Rows like those of the run; from the middle on, a share of them about something else."""
    choose = random.Random(seed)
    write_labelled(path, count, seed=seed)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    with path.open("w") as stream:
        for number, row in enumerate(rows):
            if number >= count // 2 and choose.random() < other:
                row["text"] = " ".join(choose.choices(OTHERS, k=12))
            stream.write(json.dumps({"text": row["text"], "created": 1767225600 + 60 * number}) + "\n")
    return path


def monitored(run: Path, data: Path, *words: str) -> tuple[int, dict]:
    code = main(["monitor", str(run), "--data", str(data), *words])
    return code, read_result(run)


def test_rows_like_those_of_the_training_and_others(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    same = write_rows(tmp_path / "same.jsonl", 300)
    code, result = monitored(run, same, "--fail-on-drift")
    assert code == 0
    assert result["verdict"] in ("none", "undecided")
    names = {signal["name"] for signal in result["signals"]}
    assert {"embeddings", "classifier", "characters", "confidence", "prediction"} <= names
    assert (
        next(signal for signal in result["signals"] if signal["name"] == "confidence")["against"] == "validation rows"
    )
    assert result["budget"]["check"] == 1

    code, result = monitored(
        run, write_rows(tmp_path / "other.jsonl", 300, other=0.5), "--fail-on-drift", "--model-rows=0"
    )
    assert (code, result["verdict"], result["budget"]["check"]) == (3, "drift", 2)
    assert {signal["name"] for signal in result["signals"] if signal["drifts"]} >= {"embeddings", "classifier"}
    begin = 1767225600 + 60 * 150
    since = result["since"]
    assert since is not None and abs(_seconds(since) - begin) < 60 * 40
    assert set(result["clusters"][0]["words"]) & set(OTHERS)
    assert "refund" in (run / "monitor" / "report.html").read_text()  # the user's own file: its rows may be shown
    assert "invoice" in capsys.readouterr().out

    code, again = monitored(run, tmp_path / "other.jsonl", "--model-rows=0")
    assert (code, again["budget"]["check"]) == (0, 2)  # the same rows spend nothing again
    assert "refund payment" not in (run / "monitor" / "checks.jsonl").read_text()


def _seconds(moment: str) -> float:
    import datetime

    return datetime.datetime.fromisoformat(moment).timestamp()


def test_too_few_rows_are_undecided_and_how_many_it_takes_is_told(run: Path, tmp_path: Path) -> None:
    code, result = monitored(
        run, write_rows(tmp_path / "few.jsonl", 30), "--model-rows=0", "--no-streams", "--effect=0.05"
    )
    assert (code, result["verdict"]) == (0, "undecided")
    assert result["power"]["power"] < 0.8 < result["power"]["rows_needed"]
    code, result = monitored(run, write_rows(tmp_path / "fewer.jsonl", 5), "--model-rows=0", "--no-streams")
    assert (code, result["verdict"], result["power"]) == (0, "undecided", None)


def test_no_word_of_a_server_s_logs_is_written(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = tmp_path / "state"
    log = RequestLog(state / "requests", str)
    rows = [
        json.loads(line)["text"] for line in write_rows(tmp_path / "x.jsonl", 240, other=1.0).read_text().splitlines()
    ]
    import datetime

    for number, text in enumerate(rows):
        moment = datetime.datetime.now(datetime.UTC) - datetime.timedelta(minutes=240 - number)
        row = {
            "id": f"req_{number}",
            "response": None,
            "created": moment,
            "key": "k",
            "user": f"u{number}",
            "model": "m",
        }
        log.add(row | {"version": "v1", "status": 200}, "/classify", {"input": text}, b"{}")
    log.close()
    code, result = monitored(run, state, "--model-rows=0", "--window=1d", "--fail-on-drift")
    assert (code, result["verdict"], result["versions"]) == (3, "drift", ["v1"])
    assert result["clusters"][0]["rows"][0].startswith("req_")
    screen = capsys.readouterr().out
    example = next(text for text in rows if text.split()[0] in OTHERS and text[:60] in screen)  # shown, not kept
    for file in (run / "monitor").iterdir():
        assert example[:40] not in file.read_text()


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--window=7"], "not a length of time"),
        (["--alpha=0", "--rows=3", "--checks=0"], "at least 20"),
        (["--canaries=missing.jsonl"], "cannot be read"),
        (["--embeddings=/nowhere/model"], "MODEL"),
    ],
)
def test_what_is_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], reason: str
) -> None:
    data = write_rows(tmp_path / "rows.jsonl", 40)
    assert main(["monitor", str(run), "--data", str(data), "--model-rows=0", *words]) == 2
    assert reason in capsys.readouterr().err


def test_a_window_needs_times(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_labelled(tmp_path / "rows.jsonl", 40)
    assert main(["monitor", str(run), "--data", str(data), "--window=7d"]) == 2
    assert "without a time" in capsys.readouterr().err


def test_shift_between_files_and_from_a_run(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    same, other = write_rows(tmp_path / "a.jsonl", 150), write_rows(tmp_path / "b.jsonl", 150, other=1.0, seed=2)
    assert main(["data", "shift", str(same), str(other), "--json", "--fail-on-drift"]) == 3
    assert json.loads(capsys.readouterr().out)["verdict"] == "drift"
    assert main(["data", "shift", str(run), str(same), "--fail-on-drift"]) == 0
    assert "validation rows of" in capsys.readouterr().out
    assert main(["data", "--help"]) == 0


def test_a_server_shows_the_newest_result(run: Path, tmp_path: Path) -> None:
    if not read_result(run):
        monitored(run, write_rows(tmp_path / "x.jsonl", 100), "--model-rows=0")
    result = read_result(run)
    arguments = options.parsed(["model", "--monitor", str(run)])
    (service,) = (service for service in options.served(arguments) if service.name == "monitor")
    service.open(arguments, tmp_path, tmp_path)

    async def test(found) -> None:
        found.gateway.add_routes(service.routes(found.gateway))
        service.attach(found.gateway)
        admin = found.client(found.admin)
        text = (await admin.get("/metrics")).text
        assert f'dstune_drift_verdict{{run="run",verdict="{result["verdict"]}"}} 1.0' in text
        assert 'dstune_drift_corrected_p{run="run",signal="embeddings"}' in text
        checked = next(line for line in text.splitlines() if line.startswith("dstune_drift_checked_seconds"))
        assert time.time() - 3600 < float(checked.split()[-1]) <= time.time()
        assert (await admin.get("/admin/monitor")).json()["data"] == [result]
        assert (await found.client().get("/admin/monitor")).status_code == 403

    state = tmp_path / "state"
    state.mkdir()
    run_served(test, state)
    assert list(service.check(options.parsed(["model", "--monitor", str(tmp_path)])))


def test_runs_of_the_same_name_have_series_of_their_own(tmp_path: Path) -> None:
    runs = [tmp_path / place for place in ("a/x/run", "b/x/run", "other")]
    for number, run in enumerate(runs):
        (run / "monitor").mkdir(parents=True)
        result = {"verdict": "none", "checked": f"2026-01-02T03:04:0{number}+00:00", "signals": []}
        (run / "monitor" / "monitor.json").write_text(json.dumps(result))
    checked = [*DriftGauges([*runs, runs[0]]).collect()][-1]
    labels = [sample.labels["run"] for sample in checked.samples]
    assert labels == ["a/x/run", "b/x/run", "other"]


def test_a_language_model_is_measured_by_the_loss_of_what_was_asked(tmp_path: Path) -> None:
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = save_decoder(tmp_path / "model")
    served = save_run(tmp_path / "run", model, write_dialogues(tmp_path / "rows.jsonl", 40), "task=chat", scale=0.0)
    texts = [" ".join(WORDS[:6]), WORDS[0]]
    config = read_run(served / "run.yaml").config
    found = measure(served, config, [Conversation(text, (text,)) for text in texts])["prompt_loss"]
    ids = AutoTokenizer.from_pretrained(model)(texts[0], return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        expected = float(AutoModelForCausalLM.from_pretrained(model)(input_ids=ids, labels=ids).loss)
    assert found[0] == pytest.approx(expected, rel=1e-4)
    assert np.isnan(found[1])  # one token predicts nothing


def test_words_of_the_tiny_vocabulary_are_not_those_of_the_others() -> None:
    assert not set(WORDS) & set(OTHERS)
