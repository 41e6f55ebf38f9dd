"""The parsers of foreign text, as `fuzz.py` calls them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

import yaml

from benchmarks.fuzz_inputs import (
    ACCELERATE,
    ADAPTER,
    AXOLOTL,
    CHAT,
    COMMITTED,
    DATA_REPORT,
    DEEPSPEED,
    ENVIRONMENT,
    FACTORS,
    KINDS,
    LAUNCH,
    LLAMA,
    LLAMA_FACTORY,
    METRICS,
    MODULES,
    PIECES,
    RECORD,
    REFERENCE,
    RESULT,
    ROWS,
    SAMPLES,
    STATE,
    TRIAL,
    TRL,
    Make,
    as_json,
    damaged,
    fixed,
    json_file,
    like,
    lists,
    mapped,
    one_of,
    text,
    yaml_file,
    yaml_text,
)
from dstune.core.errors import UserError


@dataclass(frozen=True)
class Parser:
    name: str
    inputs: Make
    parse: Callable[[Any, Path], object]
    """Gets an input and an empty folder."""
    allowed: tuple[type[BaseException], ...] = (UserError,)
    weight: float = 1.0
    """Of all inputs, as a multiple of an even share."""


@cache
def configuration(*overrides: str) -> Any:
    from dstune.config.compose import compose

    return compose(["data.train=rows.jsonl", *overrides]).config


def check_rows(rows: Any, tasks: tuple[str, ...] | None = None) -> None:
    """Bring rows to one shape, under every task that reads rows."""
    from dstune.data.rows import RowError, canonical, normalise, recognise
    from dstune.protocols import TASKS

    rows = [row for row in rows if row.fields is not None]
    for task in TASKS if tasks is None else tasks:
        config = TASKS[task].Config()
        for row in rows[:3]:
            try:
                fmt = recognise(row.fields, {}, "auto", config, "rows:1")
                canonical(normalise(row.fields, fmt, {}, config))
            except (UserError, RowError):
                continue


def rows_of_file(name: str) -> Callable[[bytes, Path], None]:
    def parse(content: bytes, folder: Path) -> None:
        from dstune.config.data_schema import TextRows
        from dstune.data import sources
        from dstune.data.files import DataFile

        file = folder / name
        file.write_bytes(content)
        check_rows(
            list(sources.read(DataFile(file, text_rows=TextRows.paragraph if name.endswith(".md") else TextRows.line))),
            ("chat",),
        )

    return parse


def one_row(fields: Any, folder: Path) -> None:
    from dstune.data.files import DataFile, RawRow

    if isinstance(fields, dict):
        check_rows([RawRow(DataFile(folder / "rows.jsonl"), 1, fields)])


def jsonl(rows: list[Any]) -> bytes:
    return "\n".join(map(as_json, rows)).encode("utf-8", "surrogatepass")


def csv_text(cells: list[list[str]]) -> bytes:
    return "\n".join(",".join(row) for row in cells).encode("utf-8", "surrogatepass")


@cache
def tables() -> dict[str, bytes]:
    import gzip
    import io
    import zipfile

    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["x", "y"])})
    labelled = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]}, features).data.table
    messages = pa.table(
        {"messages": [CHAT["messages"][:2], CHAT["messages"][:2]], "at": pa.array([0, 1], pa.timestamp("us"))}
    )
    found = {}
    for name, table in (("labelled", labelled), ("messages", messages)):
        parquet, arrow, stream = io.BytesIO(), io.BytesIO(), io.BytesIO()
        pq.write_table(table, parquet)
        with pa.ipc.new_file(arrow, table.schema) as writer:
            writer.write_table(table)
        with pa.ipc.new_stream(stream, table.schema) as writer:
            writer.write_table(table)
        found |= {
            f"parquet {name}": parquet.getvalue(),
            f"arrow {name}": arrow.getvalue(),
            f"stream {name}": stream.getvalue(),
        }
    found["gzip"] = gzip.compress(jsonl([CHAT, CHAT]), mtime=0)
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as writer:
        writer.writestr("rows.jsonl", jsonl([CHAT]))
    found["zip"] = archive.getvalue()
    return found


def later(make: Callable[[], Make]) -> Make:
    """Of an example that takes long to make."""
    made = cache(make)
    return lambda random: made()(random)


def table_files(kind: str) -> Make:
    return later(lambda: one_of(*(damaged(content) for name, content in tables().items() if name.startswith(kind))))


def zipped(content: bytes, folder: Path) -> None:
    from dstune.data import sources

    file = folder / "rows.zip"
    file.write_bytes(content)
    for one in sources.expand(str(file), "data.train"):
        check_rows(list(sources.read(one)), ("chat",))


def saved_set(content: bytes, folder: Path) -> None:
    from dstune.data import sources

    (folder / "state.json").write_bytes(content)
    (folder / "dataset_info.json").write_bytes(content)
    (folder / "dataset_dict.json").write_bytes(content) if content.startswith(b'{"splits') else None
    for file in sources.expand(str(folder), "data.train"):
        assert file.path.resolve().is_relative_to(folder.resolve()), f"reads {file.path}"


def prompts_file(content: bytes, folder: Path) -> None:
    from dstune.inference.prompts import read_file

    (folder / "prompts.jsonl").write_bytes(content)
    read_file(folder / "prompts.jsonl")


@cache
def tokenizer() -> Any:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
    from unit.data_helpers import byte_tokenizer

    return byte_tokenizer()


def template(text: str, folder: Path) -> None:
    from dstune.data.chat.template import RenderError
    from dstune.data.render import ChatRenderer

    own = tokenizer()
    own.chat_template = text
    renderer = ChatRenderer(own, "2025-03-09")
    try:
        renderer.passages([{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}])
    except RenderError:
        return


def templates() -> Make:
    def pieces(random: Random) -> str:
        return "".join(random.choice((random.choice(PIECES), text(random))) for _ in range(random.randrange(1, 9)))

    def beside(random: Random) -> str:
        return f"{pieces(random)}{tokenizer().chat_template}{pieces(random)}"

    changed = later(lambda: damaged(str(tokenizer().chat_template).encode()))
    return one_of(pieces, mapped(changed, decoded), beside)


def decoded(raw: bytes) -> str:
    return raw.decode("utf-8", "replace")


def imported(content: bytes, folder: Path) -> None:
    from dstune.importing import convert as conversion
    from dstune.importing.files import read, tool_of

    file = folder / "config.yaml"
    file.write_bytes(content)
    raw = read(file)
    # Composing the experiment takes 100 times as long, and Hydra's parser is not ours: one in so many.
    composes = hash(content) % 50 == 0
    with mock.patch.object(conversion, "problems_of", conversion.problems_of if composes else lambda text: []):
        found = conversion.convert(raw, tool_of(raw, None, str(file)), file)
    yaml.safe_load(found.text)


def imported_script(content: bytes, folder: Path) -> None:
    from dstune.importing.files import read

    (folder / "train.sh").write_bytes(content)
    read(folder / "train.sh")


def deepspeed(name: str) -> Callable[[bytes, Path], None]:
    def parse(content: bytes, folder: Path) -> None:
        from dstune.config.deepspeed_file import read

        (folder / name).write_bytes(content)
        read(folder / name)

    return parse


def hostfile(content: bytes, folder: Path) -> None:
    from dstune.launch.host_slots import chosen, read

    (folder / "hostfile").write_bytes(content)
    text = content.decode("utf-8", "replace")
    hosts = read(str(folder / "hostfile"))
    chosen(hosts, text[:60] or None, None)


@cache
def run_yaml() -> dict[str, Any]:
    from dstune.config.convert import to_dict

    return {"format": 2, "dstune_version": "0.1", "overrides": ["a=b"], "config": to_dict(configuration())}


run_yaml_file = later(lambda: yaml_file(run_yaml()))


@cache
def good_run_yaml() -> bytes:
    return yaml_text(run_yaml())


run_files = fixed(
    {
        "launch.json": json_file(LAUNCH),
        "result.json": json_file(RESULT),
        "metrics.jsonl": one_of(mapped(lists(one_of(*map(like, METRICS)), 4), jsonl), damaged(jsonl(METRICS))),
        "samples.jsonl": mapped(lists(like(SAMPLES[0]), 3), jsonl),
        "environment.json": json_file(ENVIRONMENT),
        "data_report.json": json_file(DATA_REPORT),
        "run.yaml": one_of(run_yaml_file, lambda random: good_run_yaml()),
    }
)


def in_run(files: dict[str, bytes], folder: Path) -> Path:
    run = folder / "run"
    run.mkdir()
    for name, content in files.items():
        (run / name).write_bytes(content)
    return run


def records_of_run(files: dict[str, bytes], folder: Path) -> None:
    from dstune.launch import attempt, records
    from dstune.launch.manage import status_of

    run = in_run(files, folder)
    records.read_launch(run)
    records.read_result(run)
    records.read_metrics(run)
    status_of(run).to_json(run)
    attempt.of_files(run, 2, "none")


def runs_verb(files: dict[str, bytes], folder: Path) -> None:
    from dstune.launch.runs import as_text, listed

    in_run(files, folder)
    found = listed(folder)
    assert len(found) == 1, "a bad directory is listed too"
    as_text(found, [folder])


def report(files: dict[str, bytes], folder: Path) -> None:
    from dstune.report.page import write

    write([in_run(files, folder)], folder / "report.html")


def summary_of(files: dict[str, bytes], folder: Path) -> None:
    from dstune.launch.summary import summary

    summary(in_run(files, folder))


def sweep(files: dict[str, Any], folder: Path) -> None:
    from dstune.launch.runs import as_text, listed
    from dstune.report.sweep_page import write

    (folder / "trials").mkdir()
    (folder / "sweep.yaml").write_bytes(files["sweep.yaml"])
    for number, content in enumerate(files["trials"]):
        (folder / "trials" / f"t{number}.json").write_bytes(content)
    as_text(listed(folder), [folder])
    write(folder, folder / "sweep.html")


def stored_run(content: bytes, folder: Path) -> None:
    from dstune.config.convert import from_dict
    from dstune.config.run_file import read_run_content

    (folder / "run.yaml").write_bytes(content)
    from_dict(read_run_content(folder / "run.yaml")["config"], "run.yaml")


def checkpoint(files: dict[str, bytes], folder: Path) -> None:
    from dstune.checkpoint import store
    from dstune.trainer.state import TrainState

    place = folder / "checkpoints" / "step-00000003"
    place.mkdir(parents=True)
    for name, content in files.items():
        (place / name).write_bytes(content)
    store.listing(folder)
    store.newest(folder)
    # As if its marker were right.
    (place / "COMMITTED").write_text(json.dumps({"files": {"state.json": {"bytes": len(files["state.json"])}}}))
    store.listing(folder)
    store.damaged_files(place)
    saved = store.read_state(place).get("train")
    if isinstance(saved, dict):
        TrainState.from_dict(saved)


def model_folder(content: bytes, folder: Path) -> None:
    from dstune.checkpoint.record import task_of_head
    from dstune.config.architectures import row_limit
    from dstune.config.schema import ModelConfig
    from dstune.launch.preflight import description_problems
    from dstune.planning.architecture import architecture
    from dstune.planning.source import config_json

    (folder / "config.json").write_bytes(content)
    description_problems(folder, ModelConfig(path=str(folder)), configuration())
    task_of_head(folder)
    found = config_json(ModelConfig(path=str(folder)))
    row_limit(found)
    architecture(found)


def adapter(content: bytes, folder: Path) -> None:
    from dstune.checkpoint.serving import vllm_problems
    from dstune.config.convert import convert
    from dstune.core.limits import check_patterns
    from dstune.inference.resolve_model import adapter_settings, base_of
    from dstune.methods.lora.config import LoraConfig
    from dstune.protocols import method_of

    (folder / "adapter_config.json").write_bytes(content)
    settings = adapter_settings(folder)
    check_patterns(settings, MODULES, "method.adapter")
    vllm_problems(folder)
    try:
        method_of(LoraConfig(adapter=str(folder))).resolve()
    finally:
        base_of(folder, configuration().model)
    del convert


def record(content: bytes, folder: Path) -> None:
    from dstune.checkpoint.record import recorded_overrides

    (folder / "dstune.json").write_bytes(content)
    recorded_overrides(folder, [])


def rank_error(content: bytes, folder: Path) -> None:
    from dstune.launch.attempt import read_errors

    (folder / "logs").mkdir()
    (folder / "logs" / "rank-0.error").write_bytes(content)
    read_errors(folder, 1)


def slurm(output: str, folder: Path) -> None:
    from dstune.launch.slurm import jobs
    from dstune.protocols.launcher import Unreachable

    done = subprocess.CompletedProcess([], 0, output, "")
    with (
        mock.patch.object(subprocess, "run", return_value=done),
        mock.patch.object(jobs, "require"),
    ):
        for call in (
            lambda: [str(job) for job in jobs.ask(["12", "12_3"])],
            lambda: jobs.submit(folder / "x", {}),
            lambda: jobs.probe(needed=False),
        ):
            try:
                call()
            except (UserError, Unreachable):
                continue


def probed(output: str, folder: Path) -> None:
    from dstune.launch.hosts import _facts, explain

    _facts(output)
    explain("host", 255, output)


def weights(content: bytes, folder: Path) -> None:
    """The header of a safetensors file, and the index of several."""
    from dstune.core.errors import DstuneError
    from dstune.methods._peft.files import tensors_of
    from dstune.models.base_weights import tensor_files

    (folder / "adapter_model.safetensors").write_bytes(content)
    (folder / "model.safetensors.index.json").write_bytes(content)
    for read in (lambda: tensors_of(folder, "method.adapter"), lambda: tensor_files(folder)):
        try:
            read()
        except (DstuneError, LookupError):
            continue


def reference(content: bytes, folder: Path) -> None:
    """The reference of an export, and an engine that answers."""
    import asyncio
    from types import SimpleNamespace

    from dstune.serve import parity

    async def prompt_ids(name: str, row: Any) -> list[int]:
        return [1, 2]

    async def logprobs(name: str, ids: list[int]) -> list[float]:
        return [-0.5 for _ in ids]

    async def answers(rows: list[Any]) -> dict[str, Any]:
        return {"ids": [[1, 2] for _ in rows], "answers": [{"vector": [0.5]} for _ in rows]}

    (folder / "reference.json").write_bytes(content)
    engine: Any = SimpleNamespace(dtype="float32", prompt_ids=prompt_ids, logprobs=logprobs, answers=answers)
    for generates in (True, False):
        source: Any = SimpleNamespace(folder=folder, generates=generates)
        try:
            asyncio.run(parity.prove(engine, "m", source, None))
        except parity.Refused:
            continue


def served_adapter(files: dict[str, bytes], folder: Path) -> None:
    import numpy as np
    from safetensors.numpy import save_file

    from dstune.serve import adapters, source

    base, own = folder / "base", folder / "own"
    base.mkdir(), own.mkdir()
    save_file({"a.weight": np.zeros((2, 3), np.float32)}, base / "model.safetensors")
    (base / "config.json").write_text("{}")
    for name, content in files.items():
        (own / name).write_bytes(content)
    adapters.check(source.resolve("m", str(own)), source.resolve("b", str(base)), one_template=True)


@cache
def safetensors_bytes() -> bytes:
    import numpy as np
    from safetensors.numpy import save

    return save({"a.lora_A.weight": np.zeros((2, 3), np.float32)}, {"format": "pt"})


def error_of(text: str) -> bytes:
    return json.dumps(
        {"type": text, "message": "m", "problems": [{"where": "w", "reason": "r", "fix": "f", "value": "v"}]}
    ).encode()


def prepare() -> None:
    """What takes seconds once, so that no round pays for it: heavy imports, and examples that are made."""
    import datasets  # noqa: F401
    import pyarrow.parquet  # noqa: F401
    import transformers  # noqa: F401

    import dstune.data.render
    import dstune.importing.convert
    import dstune.launch.preflight
    import dstune.report.sweep_page  # noqa: F401
    from dstune.protocols import METHODS, TASKS

    TASKS.classes(), METHODS.classes()
    configuration(), run_yaml(), tokenizer(), tables(), safetensors_bytes()


def parsers() -> dict[str, Parser]:
    lines = [json.dumps(CHAT), json.dumps({"messages": CHAT["messages"][1:3]})]
    cells = lists(lists(one_of(text, lambda random: random.choice(('"a"', '"a\nb"', '"', "messages"))), 5), 5)
    found = [
        Parser("row", one_of(*map(like, ROWS.values())), one_row, weight=3),
        Parser(
            "rows.jsonl",
            one_of(mapped(lists(like(CHAT), 3), jsonl), damaged("\n".join(lines).encode())),
            rows_of_file("rows.jsonl"),
            weight=2,
        ),
        Parser(
            "rows.json",
            one_of(json_file([CHAT, CHAT]), damaged("\n".join(lines).encode())),
            rows_of_file("rows.json"),
            weight=2,
        ),
        Parser(
            "rows.csv",
            one_of(mapped(cells, csv_text), damaged(b'text,label\n"a ""b""",x\nc,y\n')),
            rows_of_file("rows.csv"),
        ),
        Parser(
            "rows.txt",
            one_of(damaged(b"one\n\ntwo three\n"), lambda random: random.randbytes(60)),
            rows_of_file("rows.md"),
        ),
        Parser(
            "rows.conllu",
            damaged(b"# x\n1\tA\ta\tDET\t_\t_\t0\troot\t_\t_\n\n1-2\tAB\n" * 2),
            rows_of_file("rows.conllu"),
        ),
        Parser("rows.parquet", table_files("parquet"), rows_of_file("rows.parquet")),
        Parser("rows.arrow", one_of(table_files("arrow"), table_files("stream")), rows_of_file("rows.arrow")),
        Parser("rows.jsonl.gz", table_files("gzip"), rows_of_file("rows.jsonl.gz"), weight=0.5),
        Parser("rows.zip", table_files("zip"), zipped, weight=0.5),
        Parser(
            "saved data set", json_file({"_data_files": [{"filename": "data.arrow"}], "splits": ["train"]}), saved_set
        ),
        Parser(
            "prompts",
            one_of(json_file({"prompt": "p", "adapter": "a"}), json_file({"messages": CHAT["messages"][:2]})),
            prompts_file,
        ),
        Parser("template", templates(), template, weight=0.1),
        Parser("axolotl", yaml_file(AXOLOTL), imported),
        Parser("llama-factory", yaml_file(LLAMA_FACTORY), imported),
        Parser("trl", yaml_file(TRL), imported),
        Parser(
            "script",
            damaged(b"accelerate launch train.py \\\n --learning_rate=1e-4 --lora_target a b\n"),
            imported_script,
        ),
        Parser("deepspeed", json_file(DEEPSPEED), deepspeed("ds.json")),
        Parser("accelerate", yaml_file(ACCELERATE), deepspeed("ds.yaml")),
        Parser(
            "hostfile",
            one_of(
                damaged(b"node1 slots=4\n# x\nnode2 slots=2 # y\n"),
                lambda random: text(random).encode("utf-8", "surrogatepass"),
            ),
            hostfile,
        ),
        Parser("records", run_files, records_of_run, weight=0.5),
        Parser("runs", run_files, runs_verb, (), weight=0.5),
        Parser("report", run_files, report, weight=0.5),
        Parser("summary", run_files, summary_of, weight=0.5),
        Parser(
            "sweep",
            fixed({"sweep.yaml": yaml_file({"objective": ["loss"]}), "trials": lists(json_file(TRIAL), 3)}),
            sweep,
            weight=0.5,
        ),
        Parser("run.yaml", run_yaml_file, stored_run, weight=0.3),
        Parser(
            "checkpoint",
            fixed({"state.json": json_file(STATE), "COMMITTED": json_file(COMMITTED)}),
            checkpoint,
        ),
        Parser("config.json", one_of(*(json_file(LLAMA | {"model_type": kind}) for kind in KINDS)), model_folder),
        Parser("adapter_config.json", json_file(ADAPTER), adapter, weight=0.5),
        Parser("dstune.json", json_file(RECORD), record),
        Parser("reference.json", json_file(REFERENCE), reference, weight=0.5),
        Parser(
            "served adapter",
            fixed(
                {
                    "adapter_config.json": one_of(lambda random: as_json(ADAPTER).encode(), json_file(ADAPTER)),
                    "tokenizer.json": json_file({"added_tokens": [{"content": "x", "special": True}]}),
                    "adapter_model.safetensors": mapped(
                        json_file(FACTORS), lambda header: len(header).to_bytes(8, "little") + header
                    ),
                }
            ),
            served_adapter,
            weight=0.5,
        ),
        Parser("rank error", json_file(json.loads(error_of("UserError"))), rank_error),
        Parser(
            "slurm",
            one_of(text, mapped(damaged(b"12|12|RUNNING|None|node1\n12_3|15|PENDING|(Priority)|\n"), decoded)),
            slurm,
        ),
        Parser("probe", mapped(json_file({"time": 1.0}), lambda raw: f"DSTUNE_PROBE {decoded(raw)}"), probed),
        Parser(
            "safetensors",
            one_of(later(lambda: damaged(safetensors_bytes())), json_file({"weight_map": {"a": "b"}})),
            weights,
        ),
    ]
    return {one.name: one for one in found}
