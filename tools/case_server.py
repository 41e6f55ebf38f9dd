"""Runs the cases of one tree of dstune: `python case_server.py FOLDER MODELS` with that tree on PYTHONPATH.

Each line on stdin is a `Case` as JSON, each answer its `Outcome`. Everything is imported once, and each rank is a child that calls
the command line's `main` alone. Nothing of the tree that this file is in is imported.
"""

from __future__ import annotations

import hashlib
import json
import os
import select
import shutil
import signal
import socket
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

CASE_SECONDS = 180.0
CLOCKS = ("seconds", "per_second", "gib", "utilization", "flops", "hours")
"""A metric with one of these in its name depends on the machine's mood."""
TEXTS = ("README.md",)
"""Files of an export whose wording may change: a difference is reported for review, not as a deviation."""


@dataclass(frozen=True)
class Case:
    """One command line."""

    name: str
    argv: list[str]
    ranks: int
    """0: the launcher's own process, which only composes and refuses."""
    folder: str | None = None
    """Where the command runs; an empty folder when not given."""
    run: str = "run"
    """The run directory below it."""


@dataclass
class Outcome:
    """What a tree made of a case."""

    exit_code: int
    seconds: float
    metrics: list[dict[str, Any]] = field(default_factory=list)
    samples: list[Any] = field(default_factory=list)
    export: dict[str, Any] = field(default_factory=dict)
    """Hash of every tensor and of every other file, by name."""
    texts: dict[str, str] = field(default_factory=dict)
    problems: list[dict[str, str]] = field(default_factory=list)
    log: str = ""


ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "WANDB_MODE": "offline",
    "OMP_NUM_THREADS": "1",
    "PYTHONHASHSEED": "0",  # an adapter_config.json lists a set
    "TOKENIZERS_PARALLELISM": "false",
    "CUDA_VISIBLE_DEVICES": "",
    "PYTHONDONTWRITEBYTECODE": "1",
    "DS_ACCELERATOR": "cpu",
}
LIBRARIES = (
    *(
        "torch",
        "transformers",
        "datasets",
        "peft",
        "sklearn.metrics",
        "seqeval.metrics",
        "scipy.stats",
        "safetensors.torch",
    ),
    *("hydra", "omegaconf", "wandb", "deepspeed", "bitsandbytes", "sacrebleu", "rouge_score.rouge_scorer"),
    *("transformers.models.bert.modeling_bert", "transformers.models.llama.modeling_llama"),
    *("transformers.models.t5.modeling_t5", "transformers.models.bart.modeling_bart"),
)


def serve(folder: Path, models: Path) -> None:
    """Answer each case on stdin with a line of JSON. The first child tells which modules of dstune the others need too."""
    import importlib

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    sys.modules["mlflow"] = None  # type: ignore[assignment]  # as dstune's own start does: DeepSpeed would import it
    for name in LIBRARIES:
        try:
            importlib.import_module(name)
        except ImportError as error:
            print(f"side_by_side: {error}", file=sys.stderr)
    warm_up(models)
    loaded: set[str] = set()
    for line in sys.stdin:
        case = Case(**json.loads(line))
        outcome = serve_case(case, folder)
        modules = folder / "case" / "modules"
        if case.ranks and modules.exists():
            for name in sorted(set(modules.read_text().split()) - loaded):
                loaded.add(name)
                importlib.import_module(name)
        answers.write(json.dumps(asdict(outcome)) + "\n")
        answers.flush()


def warm_up(models: Path) -> None:
    """Fill what libraries keep (tables, compiled patterns and parsers) before the first fork."""
    import transformers

    for name in ("decoder", "encoder", "t5"):
        transformers.AutoTokenizer.from_pretrained(models / name)
        transformers.AutoModel.from_pretrained(models / name)
    from dstune.cli import main

    main(["train", "--cfg", "job"])


def serve_case(case: Case, folder: Path) -> Outcome:
    logs = folder / "case"
    shutil.rmtree(logs, ignore_errors=True)
    logs.mkdir(parents=True)
    home = Path(case.folder or logs)
    began, port = time.monotonic(), free_port()
    children = [fork_rank(case, home, logs, rank, port) for rank in range(max(case.ranks, 1))]
    codes = [wait(child, began + CASE_SECONDS) for child in children]
    outcome = Outcome(next((code for code in codes if code), 0), round(time.monotonic() - began, 2))
    read_run(home / case.run, outcome)
    log_texts = [(logs / f"rank-{rank}.log").read_text(errors="replace") for rank in range(len(children))]
    if case.ranks == 0:
        outcome.problems = problems_in(log_texts[0])
    if outcome.exit_code:
        outcome.log = "\n".join(text[-3000:] for text in log_texts)
    return outcome


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def fork_rank(case: Case, home: Path, logs: Path, rank: int, port: int) -> int:
    sys.stdout.flush()
    sys.stderr.flush()
    if child := os.fork():
        return child
    code = 1
    try:
        os.setsid()
        os.chdir(home)
        log = os.open(logs / f"rank-{rank}.log", os.O_WRONLY | os.O_CREAT)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        sys.stdin = open(0, closefd=False)  # noqa: SIM115
        if case.ranks:
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": case.ranks, "LOCAL_WORLD_SIZE": case.ranks}
            os.environ.update({name: str(value) for name, value in place.items()})
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        leave = os._exit

        def record_modules(code: int) -> None:
            if rank == 0 and code == 0:
                modules = [name for name in sys.modules if name.startswith("dstune") and "__main__" not in name]
                (logs / "modules").write_text("\n".join(modules))
            leave(code)

        os._exit = record_modules  # type: ignore[assignment]
        sys.argv = ["dstune", *case.argv]
        from dstune.cli import main

        code = main(case.argv)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return 0


def wait(child: int, deadline: float) -> int:
    handle = os.pidfd_open(child)
    ready, _, _ = select.select([handle], [], [], max(deadline - time.monotonic(), 0.1))
    os.close(handle)
    if not ready:
        os.killpg(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def read_run(run: Path, outcome: Outcome) -> None:
    """Read what the run directory shows of the computation."""
    for name in ("metrics", "samples"):
        file = run / f"{name}.jsonl"
        rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        getattr(outcome, name).extend(without_clocks(row) for row in rows)
    export = run / "export"
    for file in sorted(export.rglob("*")):
        name = file.relative_to(export).as_posix()
        if file.name in TEXTS:
            outcome.texts[name] = file.read_text(errors="replace")
        elif file.suffix == ".safetensors":
            outcome.export |= {f"{name}:{tensor}": digest for tensor, digest in tensors(file)}
        elif file.suffix == ".json":
            outcome.export[name] = without_clocks(json.loads(file.read_text()))
        elif file.is_file():
            outcome.export[name] = hashlib.sha256(file.read_bytes()).hexdigest()


def without_clocks(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return {key: item for key, item in value.items() if not any(clock in key for clock in CLOCKS)}


def tensors(file: Path) -> Iterator[tuple[str, str]]:
    """Yield (name, hash of dtype, shape and bytes) of every tensor, without reading them through a library."""
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    for name, entry in sorted(json.loads(content[8 : 8 + length]).items()):
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            described = f"{entry['dtype']}{entry['shape']}".encode()
            digest = hashlib.sha256(described + content[8 + length + begin : 8 + length + end])
            yield name, digest.hexdigest()[:16]


def machine() -> str:
    """Return what two processes must have in common to compute the same bits: processor and libraries."""
    from importlib.metadata import version

    lines = Path("/proc/cpuinfo").read_text().splitlines()
    words = {line.partition(":")[0].strip(): line.partition(":")[2].strip() for line in lines}
    flags = hashlib.sha256(words.get("flags", words.get("Features", "")).encode()).hexdigest()[:8]
    libraries = [f"{name} {version(name)}" for name in ("torch", "transformers", "deepspeed", "peft")]
    return ", ".join([words.get("model name", "?"), flags, *libraries])


def problems_in(output: str) -> list[dict[str, str]]:
    for line in output.splitlines():
        if line.startswith('{"error"'):
            error = json.loads(line)["error"]
            return list(error.get("problems") or [error])
    return []


if __name__ == "__main__":
    serve(Path(sys.argv[1]), Path(sys.argv[2]))
