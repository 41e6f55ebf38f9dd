"""What is too deep, too long or too large is refused with a message: in files, rows, models and adapters of strangers."""

from __future__ import annotations

import json
import os
import resource
import struct
import time
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file

from dstune.api.run import Run
from dstune.checkpoint import gguf_header, store
from dstune.config.convert import load
from dstune.core.confinement.here import check_patterns
from dstune.core.errors import UserError
from dstune.core.parsing import parse_json, parse_yaml, read_file
from dstune.data import read_text, sources
from dstune.data.files import DataFile
from dstune.inference.resolve_model import check_adapter
from dstune.launch import records
from dstune.launch.attempt import read_errors
from dstune.launch.rundir import Before
from dstune.launch.runs import as_text, listed
from dstune.methods._peft.files import read_settings
from dstune.planning.architecture import architecture
from dstune.tracking.jsonl import rewind

LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "vocab_size": 100,
    "tie_word_embeddings": True,
}


def bomb(lines: int = 12) -> str:
    """Nine lines make a billion values."""
    first = "a0: &a0 [x,x,x,x,x,x,x,x,x]\n"
    return first + "".join(f"a{n}: &a{n} [{','.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, lines))


def merges() -> str:
    return "a0: &a0 {k: v}\n" + "".join(f"a{n}: &a{n} {{<<: [{','.join([f'*a{n - 1}'] * 9)}]}}\n" for n in range(1, 12))


@pytest.mark.parametrize(
    "text",
    [bomb(), merges(), "&a [*a]", "a: &a {b: *a}", "[" * 5000, "- " * 5000, "9" * 5000, "2024-13-45"],
    ids=["bomb", "merges", "itself", "itself in a mapping", "brackets", "dashes", "digits", "no date"],
)
def test_yaml_that_grows_or_never_ends(text: str) -> None:
    start = time.process_time()
    with pytest.raises(UserError, match="this is no YAML"):
        load(text, "run.yaml")
    assert time.process_time() - start < 2.0


def test_aliases_of_ordinary_size_stay() -> None:
    assert parse_yaml("a: &a {k: [1, 2]}\nb: *a\nc: {<<: *a, l: 3}") == {
        "a": {"k": [1, 2]},
        "b": {"k": [1, 2]},
        "c": {"k": [1, 2], "l": 3},
    }


@pytest.mark.parametrize(
    "text", ["[" * 200_000 + "]" * 200_000, '{"a":' * 200_000 + "1" + "}" * 200_000, "[" * 101 + "]" * 101, "1" * 5000]
)
def test_json_that_is_too_deep_or_too_long(text: str) -> None:
    with pytest.raises(ValueError, match=r"nested more than|digits"):
        parse_json(text)


def test_a_key_that_stands_twice_among_many() -> None:
    """Looking for it key by key took 17.6 s of 30,000."""
    keys = ",".join(f'"k{number}":1' for number in range(200_000))
    began = time.process_time()
    with pytest.raises(ValueError, match="the key 'k199999' stands twice in an object"):
        parse_json(f'{{{keys},"k199999":2}}')
    assert time.process_time() - began < 2


def test_brackets_inside_of_text_are_no_levels() -> None:
    assert parse_json(json.dumps(["[{" * 1000])) == ["[{" * 1000]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet", "rows.zip", "rows.csv.gz"])
def test_a_pipe_or_a_device_in_the_place_of_rows(name: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(UserError, match="is a pipe or a device"):
        sources.expand(str(tmp_path / name), "data.train")
    with pytest.raises(UserError, match="holds no file of rows"):
        sources.expand(str(tmp_path), "data.train")
    (tmp_path / name).unlink()
    (tmp_path / name).symlink_to("/dev/zero")
    with pytest.raises(UserError, match="is a pipe or a device"):
        sources.expand(str(tmp_path / name), "data.train")


@pytest.mark.parametrize("bad", ["[" * 200_000 + "]" * 200_000, "1" * 5_000])
@pytest.mark.parametrize("ending", ["json", "jsonl"])
def test_rows_around_a_bad_one_are_read(bad: str, ending: str, tmp_path: Path) -> None:
    rows = ['{"text": "a"}', f'{{"text": {bad}}}', '{"text": "b"}']
    file = tmp_path / f"rows.{ending}"
    file.write_text("[" + ",\n".join(rows) + "]" if ending == "json" else "\n".join(rows))
    found = list(sources.read(DataFile(file)))
    assert [row.fields for row in found] == [{"text": "a"}, None, {"text": "b"}]
    assert found[1].line == 2
    assert "nested more than" in found[1].error or "digits" in found[1].error


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("rows.jsonl", '{{"text": "a"}}\n{{"text": "{long}"}}\n{{"text": "b"}}', 3),
        ("rows.csv", "text,n\na,1\n{long},2\nb,3", 3),
        ("rows.csv", 'text,n\na,1\n"{long}",2\nb,3', 3),
        ("rows.txt", "a\n{long}\nb", 3),
        ("rows.conllu", "1\ta\n\n1\t{long}\n\n1\tb\n", 3),
    ],
)
def test_a_field_without_end_is_one_bad_row(
    name: str, content: str, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(read_text, "MAX_ROW_BYTES", 1000)
    monkeypatch.setattr("dstune.data.read_tagged.MAX_ROW_BYTES", 1000)
    file = tmp_path / name
    file.write_text(content.format(long="x" * 5000))
    found = list(sources.read(DataFile(file)))
    assert len(found) == expected
    assert [row.fields is None for row in found] == [False, True, False]
    assert "more than" in found[1].error


def test_a_field_of_a_table_without_end_is_one_bad_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    monkeypatch.setattr("dstune.data.read_tables.MAX_ROW_BYTES", 1000)
    pq.write_table(pa.table({"text": ["a", "x" * 5000, "b"]}), tmp_path / "rows.parquet")
    found = list(sources.read(DataFile(tmp_path / "rows.parquet")))
    assert [row.fields and row.fields["text"] for row in found] == ["a", None, "b"]


@pytest.mark.parametrize(
    "change",
    [
        {"num_hidden_layers": 10**8},
        {"num_hidden_layers": 1e8},
        {"hidden_size": 2**40},
        {"num_attention_heads": 0},
        {"num_hidden_layers": "2"},
        {"vocab_size": []},
        {"hidden_size": 10**400},
        {"num_hidden_layers": -1},
    ],
)
def test_a_model_of_impossible_size(change: dict[str, Any]) -> None:
    start = time.process_time()
    with pytest.raises(UserError, match=r"its config\.json"):
        architecture(LLAMA | change)
    assert time.process_time() - start < 1.0


MODULES = [f"model.layers.{layer}.self_attn.{name}_proj" for layer in range(4) for name in "qkvo"]


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": r"(model\.)?(([a-z_.0-9]+)+)+!"},
        {"rank_pattern": {r"(([a-z_.0-9]+)+)+!": 4}},
        {"alpha_pattern": {r"(([a-z_.0-9]+)+)+!": 4}},
        {"exclude_modules": r"([a-z._0-9]|[a-z._]|.)+!"},
    ],
)
def test_a_pattern_that_backtracks(settings: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"to match its patterns .* takes more than"):
        check_patterns(settings, MODULES, "method.adapter")


@pytest.mark.parametrize("files", [0, 1100], ids="{} open files".format)
def test_ordinary_patterns_pass(files: int) -> None:
    """Also in a server with more open files than `select()` takes."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with ExitStack() as opened:
        opened.callback(resource.setrlimit, resource.RLIMIT_NOFILE, limits)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(limits[0], min(limits[1], 4096)), limits[1]))
        for _ in range(files):
            opened.enter_context(open(os.devnull))
        check_ordinary_patterns()


def check_ordinary_patterns() -> None:
    check_patterns(
        {"target_modules": r".*\.(q|v)_proj", "rank_pattern": {r"layers\.[0-3]\..*": 4, "(": 1}},
        MODULES,
        "method.adapter",
    )


def adapter(folder: Path, **settings: Any) -> Path:
    """An adapter of rank 2 with a row of peft's matrices, and other settings than it has."""
    save_file({"base_model.model.q_proj.lora_A.weight": torch.zeros(2, 8)}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2} | settings))
    return folder


LARGE = [{"r": 10**7}, {"r": 1e7}, {"rank_pattern": {"q_proj": 10**7}}, {"num_virtual_tokens": 10**9}]


@pytest.mark.parametrize("settings", LARGE, ids=str)
def test_an_adapter_that_asks_for_more_than_it_has(settings: dict[str, Any], tmp_path: Path) -> None:
    """Peft makes the matrices before it reads those of the file: a rank of ten million would take all memory."""
    folder, model = adapter(tmp_path, **settings), torch.nn.ModuleDict({"q_proj": torch.nn.Linear(8, 8)})
    with pytest.raises(UserError, match="none of its matrices has more than 8"):
        read_settings(folder, "method.adapter")
    with pytest.raises(UserError, match="none of its matrices has more than 8"):
        check_adapter(folder, model, "MODEL")
    check_adapter(adapter(tmp_path, r=2, rank_pattern={"q_proj": 4}), model, "MODEL")


@pytest.mark.parametrize("settings", [{"r": 10**7}, {"target_modules": r"(([a-z_.0-9]+)+)+!"}], ids=["rank", "pattern"])
def test_a_served_adapter_is_looked_at_before_the_engine_takes_it(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dstune.serve.engines.local import model as engine

    monkeypatch.setattr(engine, "voice_of", lambda folder, base: SimpleNamespace(tokenizer=[]))
    served = object.__new__(engine.LocalModel)
    named = torch.nn.ModuleDict({"model_layers_self_attention_q_proj_weight_of_the_base": torch.nn.Linear(8, 8)})
    monkeypatch.setattr(engine.LocalModel, "vocabulary", 5)
    vars(served).update(model=named, _base=None, _numbers=iter(range(9)), _peft=None, damaged=False)
    with pytest.raises(UserError, match=r"none of its matrices|to match its patterns"):
        served.load("theirs", adapter(tmp_path, **settings))
    assert not served.damaged


@pytest.mark.parametrize("content", ["[]", "null", "[" * 200_000, "1" * 5000])
def test_settings_of_an_adapter_that_are_none(content: str, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(content)
    with pytest.raises(UserError, match=r"adapter_config\.json"):
        read_settings(tmp_path, "method.adapter")


def run_in(folder: Path, name: str, **files: str) -> Path:
    run = folder / name
    run.mkdir()
    (run / "run.yaml").write_text(yaml.safe_dump({"format": 2, "config": {}}))
    for file, content in files.items():
        (run / file.replace("_", ".")).write_text(content)
    return run


DEEP = '{"a":' * 5000 + "1" + "}" * 5000
ODD_RUNS = {
    "deep result": {"result_json": DEEP},
    "result of lists": {"result_json": '{"status": [], "seconds": "x", "eval_final": [1], "best": 3}'},
    "huge numbers": {"result_json": '{"seconds": 1e308, "steps": ' + "9" * 4000 + "}"},
    "deep metrics": {"metrics_jsonl": DEEP + "\n"},
    "odd metrics": {
        "metrics_jsonl": '{"step": "x"}\n{"step": 1, "loss": []}\n[]\nnull\n{"step": 1e400, "loss": {}}\n{"step": 2}\n'
    },
    "huge launch": {"launch_json": '{"id": 1, "pid": ' + "9" * 40 + ', "started": 1e300, "host": "h", "processes": 1}'},
}


@pytest.mark.parametrize("name", ODD_RUNS)
def test_one_bad_directory_takes_no_other_run_from_the_list(name: str, tmp_path: Path) -> None:
    run_in(tmp_path, "bad", **ODD_RUNS[name])
    run_in(tmp_path, "good", result_json='{"status": "completed", "eval_final": {"loss": 1.5}}')
    found = {Path(line.run).name: line for line in listed(tmp_path)}
    assert set(found) == {"bad", "good"}
    assert found["good"].status == "completed"
    assert "good" in as_text(list(found.values()), [tmp_path])


def test_a_status_of_megabytes_or_lines_is_one_line_of_the_list(tmp_path: Path) -> None:
    run_in(tmp_path, "bad", result_json=json.dumps({"status": "completed\ngood  failed\n" + "x" * 10_000_000}))
    run_in(tmp_path, "good", result_json='{"status": "completed", "eval_final": {"loss": 1.5}}')
    text = as_text(listed(tmp_path), [tmp_path])
    assert len(text) < 10_000
    assert len(text.splitlines()) == 4  # the folder, the heading, two runs


def test_a_deep_line_of_metrics_is_dropped_by_the_run_that_goes_on(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1}\n' + '{"step": 1, "a": ' + "[" * 200_000 + "]" * 200_000 + '}\n{"step": 2}\n')
    rewind(file, 2)
    assert file.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_folders_and_states_of_others_are_no_checkpoints(tmp_path: Path) -> None:
    (store.folder(tmp_path) / "step-\u00b2").mkdir(parents=True)  # a digit, and no number
    assert store.listing(tmp_path) == []
    (store.folder(tmp_path) / "step-3" / "state.json").parent.mkdir()
    (store.folder(tmp_path) / "step-3" / "state.json").write_text("[" * 200_000)
    with pytest.raises(UserError, match="cannot be read"):
        store.upgrade(store.folder(tmp_path) / "step-3")


def test_a_pipe_or_a_device_is_not_read_for_ever(tmp_path: Path) -> None:
    run = run_in(tmp_path, "run")
    os.mkfifo(run / "result.json")
    os.mkfifo(run / "metrics.jsonl")
    (run / "launch.json").symlink_to("/dev/zero")
    assert records.read_metrics(run).last == {}
    with pytest.raises(UserError, match="not a regular file"):
        rewind(run / "metrics.jsonl", 2)
    assert records.read_result(run) is None
    assert records.read_launch(run) is None
    assert {*Before.of(run).files} == {"run.yaml"}
    (run / "logs").mkdir()
    os.mkfifo(run / "logs" / "rank-0.error")
    (run / "logs" / "rank-1.error").symlink_to("/dev/zero")
    assert read_errors(run, 3) == {}
    with pytest.raises(OSError, match="not a regular file"):
        read_file(Path("/dev/zero"))


def test_metrics_that_are_a_pipe_or_no_text(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("format: 3\nconfig: {}\n")
    run = Run(tmp_path)
    assert run.metrics == []
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n\xff\n[]\n' + b"[" * 200_000)
    assert run.metrics == [{"step": 1}]
    (tmp_path / "metrics.jsonl").unlink()
    os.mkfifo(tmp_path / "metrics.jsonl")
    with pytest.raises(UserError, match="is not a regular file"):
        _ = run.metrics


def test_a_file_without_end_is_not_read_whole(tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    with file.open("wb") as stream:
        stream.truncate(2**40)  # of zeros, and without a block on the disk
    with pytest.raises(OSError, match="has more than"):
        read_file(file)
    assert records.read_json(file) is None


def test_a_sparse_gguf_file_is_no_header_of_a_terabyte(tmp_path, monkeypatch):
    """A list of 2**36 empty texts, in a file that takes 4 KiB of disk."""
    file = tmp_path / "model.gguf"
    key = b"tokenizer.ggml.tokens"
    head = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", len(key)) + key
    with file.open("wb") as stream:
        stream.write(head + struct.pack("<IIQ", 9, 8, 2**36))
        stream.truncate(2**40)
    monkeypatch.setattr(gguf_header, "MAX_HEADER_BYTES", 2**20)  # quick, and 64 MiB are read in seconds
    began = time.process_time()
    for read in (gguf_header.matrix_types, gguf_header.metadata_digests):
        with pytest.raises(ValueError, match="its header longer"):
            read(file)
    assert time.process_time() - began < 5
