"""The table of the parsers of foreign text that `fuzz.py` calls, with what each is given."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from benchmarks.fuzz_common import configuration, decoded, jsonl, later, tokenizer
from benchmarks.fuzz_inputs import (
    ACCELERATE,
    ADAPTER,
    AXOLOTL,
    CHAT,
    COMMITTED,
    DEEPSPEED,
    FACTORS,
    KINDS,
    LLAMA,
    LLAMA_FACTORY,
    METRICS,
    RECORD,
    REFERENCE,
    ROWS,
    STATE,
    TOKENIZER,
    TOKENIZER_CONFIG,
    TRIAL,
    TRL,
    Make,
    as_json,
    damaged,
    fixed,
    json_file,
    just,
    like,
    lists,
    mapped,
    one_of,
    text,
    yaml_file,
)
from benchmarks.fuzz_models import (
    adapter,
    model_folder,
    opened_model,
    record,
    reference,
    safetensors_bytes,
    served_adapter,
    weights,
)
from benchmarks.fuzz_rows import (
    csv_text,
    one_row,
    prompts_file,
    rows_of_file,
    saved_set,
    table_files,
    tables,
    template,
    templates,
    zipped,
)
from benchmarks.fuzz_runs import (
    checkpoint,
    deepspeed,
    error_of,
    hostfile,
    imported,
    imported_script,
    probed,
    rank_error,
    records_of_run,
    report,
    run_files,
    run_yaml,
    run_yaml_file,
    runs_verb,
    slurm,
    stored_run,
    summary_of,
    sweep,
)
from benchmarks.fuzz_serve import (
    ANSWER,
    CHOICE,
    POOLING,
    answered,
    choice_of_tensors,
    commits,
    continued,
    events,
    pooled,
    request,
    streamed,
    table_log,
    taken,
    uploaded,
    uploads,
)
from dstune.core.errors import UserError
from dstune.serve.engines.http import FAILURES
from dstune.serve.errors import ApiError


@dataclass(frozen=True)
class Parser:
    name: str
    inputs: Make
    parse: Callable[[Any, Path], object]
    """Gets an input and an empty folder."""
    allowed: tuple[type[BaseException], ...] = (UserError,)
    weight: float = 1.0
    """Of all inputs, as a multiple of an even share."""


def prepare() -> None:
    """Prepare what takes seconds once, so that no round pays for it: heavy imports, and examples that are made."""
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
    cells = lists(lists(one_of(text, st.sampled_from(('"a"', '"a\nb"', '"', "messages"))), 5), 5)
    all_parsers = [
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
            one_of(damaged(b"one\n\ntwo three\n"), st.binary(min_size=60, max_size=60)),
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
                mapped(text, lambda parser: parser.encode("utf-8", "surrogatepass")),
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
        Parser("checkpoint", fixed({"state.json": json_file(STATE), "COMMITTED": json_file(COMMITTED)}), checkpoint),
        Parser("config.json", one_of(*(json_file(LLAMA | {"model_type": kind}) for kind in KINDS)), model_folder),
        Parser("adapter_config.json", json_file(ADAPTER), adapter, weight=0.5),
        Parser(
            "tokenizer",
            fixed(
                {
                    "config.json": one_of(just(as_json(LLAMA | {"model_type": "llama"}).encode()), json_file(LLAMA)),
                    "tokenizer.json": one_of(just(as_json(TOKENIZER).encode()), json_file(TOKENIZER)),
                    "tokenizer_config.json": json_file(TOKENIZER_CONFIG),
                }
            ),
            opened_model,
            weight=0.2,
        ),
        Parser("dstune.json", json_file(RECORD), record),
        Parser("reference.json", json_file(REFERENCE), reference, weight=0.5),
        Parser(
            "served adapter",
            fixed(
                {
                    "adapter_config.json": one_of(just(as_json(ADAPTER).encode()), json_file(ADAPTER)),
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
        Parser("request", request(), taken, (ApiError,), weight=2),
        Parser("events of an engine", events(), streamed, FAILURES),
        Parser("answer of an engine", json_file(ANSWER), answered, FAILURES),
        Parser("uploaded file", uploads(ROWS["chat"], ROWS["preference"]), uploaded),
        Parser("table log", commits(), table_log),
        Parser(
            "modules.json", fixed({name: json_file(content) for name, content in POOLING.items()}), pooled, weight=0.5
        ),
        Parser("importance.json", json_file(CHOICE), choice_of_tensors, weight=0.5),
        Parser("metrics of a run that goes on", mapped(lists(like(METRICS[1]), 4), jsonl), continued, weight=0.5),
    ]
    return {parser.name: parser for parser in all_parsers}
