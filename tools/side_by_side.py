#!/usr/bin/env python3
"""Run two trees of dstune beside each other on this machine and compare what they compute, to the bit.

usage: tools/side_by_side.py OLD_TREE NEW_TREE --work FOLDER [--only TASK,METHOD,...] [--stages 0,3] [--ranks N]
                             [--rotate] [--no-runs] [--no-errors] [--resume] [--report FILE.json]

Every task x method x ZeRO stage: a few steps on a tiny model on CPUs, through `dstune train` as rank 0 of 1 (2 at stages 2
and 3 with `--ranks 2`). Losses, gradient norms, evaluation metrics, generated samples and every tensor of the export have
to be equal. A pair that the rules refuse has to be refused by both trees, with the same problems. Then the configurations
of `tools/wrong_configurations.txt`: where, value, exit code and number of problems have to be equal; changed wordings are
written to FOLDER/wording.diff for review.

Each tree is driven through the command line's `main` alone, in one process per tree that imports everything once and forks a
child for each rank. `OLD_TREE` is a checkout of the earlier commit (`git worktree add --detach FOLDER COMMIT`); its results
stay in FOLDER and are used again (delete FOLDER/old to measure anew; `--resume` keeps those of NEW_TREE as well). `--rotate`
runs each pair at one of its stages only: a quarter of the time. Exits 1 where anything differs.
"""

from __future__ import annotations

import argparse
import difflib
import hashlib
import json
import os
import select
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

HOME = Path(__file__).resolve().parents[1]
WRONG = HOME / "tools" / "wrong_configurations.txt"
STAGES = (0, 1, 2, 3)
CASE_SECONDS = 180.0
CLOCKS = ("seconds", "per_second", "gib", "utilization", "flops", "hours")
"""A metric with one of these in its name depends on the machine's mood."""
TEXTS = ("README.md",)
"""Files of an export whose wording may change: a difference is reported for review, not as a deviation."""

COMMON = [
    *("launch.processes=1", "run.dir=run", "run.name=side", "trainer.precision=fp32", "trainer.micro_batch_size=2"),
    *("trainer.global_batch_size=8", "trainer.max_steps=3", "optimizer.lr=1e-2", "data.max_length=48"),
    *("checkpoint.every=2", "evaluate.every=2", "zero.param_persistence_threshold=0"),
]
TASKS: dict[str, list[str]] = {
    "chat": [
        "model.path=MODELS/decoder",
        "data.train=DATA/chat.jsonl",
        "evaluate.samples=1",
        "evaluate.max_new_tokens=3",
    ],
    "causal_lm": ["model.path=MODELS/decoder", "data.train=DATA/texts.jsonl"],
    "classification": ["model.path=MODELS/encoder", "data.train=DATA/labelled.jsonl"],
    "preference": ["model.path=MODELS/decoder", "data.train=DATA/preferences.jsonl"],
    "reward": ["model.path=MODELS/decoder", "data.train=DATA/preferences.jsonl"],
    "embedding": ["model.path=MODELS/encoder", "data.train=DATA/contrastive.jsonl"],
    "token_classification": ["model.path=MODELS/encoder", "data.train=DATA/tagged.jsonl", "task.stride=8"],
    "question_answering": ["model.path=MODELS/encoder", "data.train=DATA/questions.jsonl", "task.stride=8"],
    "seq2seq": ["model.path=MODELS/t5", "data.train=DATA/pairs.jsonl", "evaluate.generate_rows=2"],
}
METHODS: dict[str, list[str]] = {
    "full": [],
    "head": [],
    "lora": ["method.rank=4"],
    "features": ["method.layers=1", "method.logistic_regression=true"],
    "freeze": ["method.embeddings=true", "method.first_layers=1"],
    "ulmfit": ["method.unfreeze_steps=1"],
    "importance": ["method.score_steps=2"],
    # Blocks of 64 weights share a scale, and the T5 of seq2seq has tied weights that cannot be halved.
    "qlora": ["method.rank=4", "model.path=MODELS/wide"],
    "ia3": [],
    "vera": ["method.rank=8"],
    "oft": ["method.block_size=8"],
    "prompt": ["method.virtual_tokens=4"],
    "prefix": ["method.virtual_tokens=4"],
    "p_tuning": ["method.virtual_tokens=4", "method.encoder_size=16"],
}
PLAIN_ENCODER = "model.path=MODELS/wide_encoder"
QLORA_MODELS = {
    **dict.fromkeys(("classification", "embedding", "token_classification", "question_answering"), PLAIN_ENCODER),
    "seq2seq": "model.path=MODELS/wide_t5",
}
VARIANTS: dict[str, list[str]] = {
    "regression": ["task=classification", "task.regression=true", "data.train=DATA/scored.jsonl"],
    "focal": ["task=classification", "task.focal_gamma=2", "task.balanced=true"],
    "ulmfit-language-model": [
        "task=classification",
        "method=ulmfit",
        "method.language_model_epochs=1",
        "trainer.epochs=2",
    ],
    "slices": ["task=question_answering", "evaluate.slices=[source]", "evaluate.min_slice_rows=1"],
    "no-answer": ["task=question_answering", "task.no_answer=true", "data.train=DATA/unanswered.jsonl"],
    "orpo": ["task=preference", "task.loss=orpo"],
    "simpo": ["task=preference", "task.loss=simpo"],
    "ipo": ["task=preference", "task.loss=ipo", "method=lora"],
    "kto": ["task=preference", "task.loss=kto"],
    "symmetric": ["task=embedding", "task.symmetric=true", "task.pooling=cls"],
    "decoder-seq2seq": ["task=seq2seq", "model.path=MODELS/decoder"],
    "bart": ["task=seq2seq", "model.path=MODELS/bart"],
    "dora": ["task=chat", "method=lora", "method.dora=true", "method.lr_ratio=4"],
    "pissa": ["task=chat", "method=lora", "method.rank=4", "method.init=pissa"],
    "importance-tensors": ["task=classification", "method=importance", "method.unit=tensors", "method.share=0.3"],
    "layer-decay": ["task=classification", "method.layer_decay=0.8", "schedule=slanted_triangular"],
    "sgd": ["task=chat", "optimizer=sgd", "schedule=linear", "optimizer.momentum=0.9"],
    "stable-decay": ["task=chat", "schedule=warmup_stable_decay"],
    "replay": ["task=causal_lm", "forgetting.replay=0.3", "forgetting.general=DATA/general.jsonl"],
    "l2sp": ["task=classification", "forgetting.l2sp=0.1"],
    "ewc": ["task=causal_lm", "forgetting.ewc=10", "forgetting.ewc_rows=8", "forgetting.general=DATA/general.jsonl"],
    "mixture": [
        *("task=chat", "data.mixture.a.path=DATA/chat.jsonl", "data.mixture.b.path=DATA/texts.jsonl"),
        *("data.mixture.b.task=causal_lm", "data.mixture.b.weight=2", "data.train=null"),
    ],
    "selective": ["task=causal_lm", "trainer.activation_checkpointing=selective"],
    "spikes": ["task=chat", "trainer.spike.action=skip", "trainer.early_stopping.patience=1"],
    "bf16": ["task=chat", "trainer.precision=bf16"],
}
"""Settings that take another path through the code than the pairs do."""


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


# --- cases --------------------------------------------------------------------------------------------------------------


def pairs(only: Sequence[str], stages: Sequence[int], ranks: int, folder: Path, *, rotate: bool) -> Iterator[Case]:
    """Every task x method x stage, and the variants; `only` keeps the names that contain one of its words."""
    number = 0
    for task, of_task in TASKS.items():
        for method, of_method in METHODS.items():
            more = [QLORA_MODELS[task]] if method == "qlora" and task in QLORA_MODELS else []
            chosen = [stages[number % len(stages)]] if rotate else stages
            number += 1
            for stage in chosen:
                words = [f"task={task}", f"method={method}", *of_task, *of_method, *more]
                if expected := case(f"{task}-{method}-{stage}", words, stage, ranks, folder, only):
                    yield expected
    for name, words in VARIANTS.items():
        task = next(word for word in words if word.startswith("task=")).removeprefix("task=")
        chosen = [stages[number % len(stages)]] if rotate else stages
        number += 1
        for stage in chosen:
            if expected := case(f"{name}-{stage}", [*TASKS[task], *words], stage, ranks, folder, only):
                yield expected


def case(name: str, words: list[str], stage: int, ranks: int, folder: Path, only: Sequence[str]) -> Case | None:
    parts = name.split("-")
    if only and not all(part in parts or part == "-".join(parts[:-1]) for part in only):
        return None
    mine = [word for word in COMMON if not (stage < 3 and word.startswith("zero."))]
    if any(word.startswith("trainer.epochs=") for word in words):
        mine = [word for word in mine if not word.startswith("trainer.max_steps=")]
    last = {
        word.partition("=")[0]: word
        for word in (*words, *mine)
        if word not in mine or word.partition("=")[0] not in {other.partition("=")[0] for other in words}
    }
    argv = [*last.values(), f"zero=stage{stage}"]
    argv = [word.replace("MODELS", str(folder / "models")).replace("DATA", str(folder / "data")) for word in argv]
    return Case(name, ["train", *argv], ranks if stage >= 2 else 1)


def wrong_configurations() -> Iterator[Case]:
    for number, line in enumerate(WRONG.read_text(encoding="utf-8").splitlines(), 1):
        if line and not line.startswith("#"):
            yield Case(f"wrong-{number}", ["train", *shlex.split(line), "--json"], 0)


# --- models and data ----------------------------------------------------------------------------------------------------


def make_inputs(folder: Path) -> None:
    """Tiny models and rows, once for both trees, with the makers of the tests."""
    if (folder / "inputs-made").exists():
        return
    sys.path.insert(0, str(HOME))
    from tests.support import tiny

    models, data = folder / "models", folder / "data"
    data.mkdir(parents=True, exist_ok=True)
    tiny.save_decoder(models / "decoder")
    tiny.save_encoder(models / "encoder")
    tiny.save_decoder(models / "wide", hidden_size=64, intermediate_size=128)
    tiny.save_encoder(models / "wide_encoder", hidden_size=64, intermediate_size=128)
    tiny.save_t5(models / "t5")
    tiny.save_t5(models / "wide_t5", d_model=64, d_kv=16, d_ff=128)
    tiny.save_bart(models / "bart")
    tiny.write_dialogues(data / "chat.jsonl", 40)
    tiny.write_labelled(data / "labelled.jsonl", 40)
    tiny.write_preferences(data / "preferences.jsonl", 40)
    tiny.write_contrastive(data / "contrastive.jsonl", 40)
    tiny.write_tagged(data / "tagged.jsonl", 40)
    tiny.write_questions(data / "questions.jsonl", 40)
    tiny.write_questions(data / "unanswered.jsonl", 40, unanswered=0.4)
    tiny.write_pairs(data / "pairs.jsonl", 40)
    tiny.write_scored(data / "scored.jsonl", 40)
    for name, seed in (("texts", 0), ("general", 7)):
        tiny.write_scored(data / f"{name}.scored", 40, seed=seed)
        rows = [json.loads(line) for line in (data / f"{name}.scored").read_text().splitlines()]
        lines = [json.dumps({"text": row["text"]}) for row in rows]
        (data / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "inputs-made").touch()


# --- one tree: a server that forks --------------------------------------------------------------------------------------


class Tree:
    """One tree's process and its results, a JSON file each, in `folder`."""

    def __init__(self, tree: Path, folder: Path, models: Path):
        self.tree, self.folder, self.models = tree, folder, models
        folder.mkdir(parents=True, exist_ok=True)
        self._server: subprocess.Popen[str] | None = None

    def run(self, case: Case, *, again: bool) -> Outcome:
        kept = self.folder / "results" / f"{case.name}.json"
        if kept.exists() and not again:
            stored = json.loads(kept.read_text())
            if stored["case"] == asdict(case):
                return Outcome(**stored["outcome"])
        outcome = self._ask(case)
        if case.ranks and outcome.exit_code == 2:  # refused: what the launcher says, as JSON
            refused = self._ask(Case(case.name, [*case.argv, "--json"], 0))
            outcome.problems = refused.problems
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps({"case": asdict(case), "outcome": asdict(outcome)}))
        return outcome

    def _ask(self, case: Case) -> Outcome:
        if self._server is None or self._server.poll() is not None:
            self._server = subprocess.Popen(
                [sys.executable, __file__, "--serve", str(self.folder.absolute()), str(self.models.absolute())],
                cwd=self.folder,
                env={
                    **os.environ,
                    **ENVIRONMENT,
                    "PYTHONPATH": str(self.tree),
                    "DSTUNE_CACHE": str(self.folder / "cache"),
                },
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        assert self._server.stdin is not None and self._server.stdout is not None
        self._server.stdin.write(json.dumps(asdict(case)) + "\n")
        self._server.stdin.flush()
        answer = self._server.stdout.readline()
        if not answer:
            raise SystemExit(f"the process of {self.tree} ended: {self._server.wait()}")
        return Outcome(**json.loads(answer))

    def close(self) -> None:
        if self._server is not None and self._server.stdin is not None:
            self._server.stdin.close()
            self._server.wait()


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
    reported = [(logs / f"rank-{rank}.log").read_text(errors="replace") for rank in range(len(children))]
    if case.ranks == 0:
        outcome.problems = problems_in(reported[0])
    if outcome.exit_code:
        outcome.log = "\n".join(log[-3000:] for log in reported)
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
                mine = [name for name in sys.modules if name.startswith("dstune") and "__main__" not in name]
                (logs / "modules").write_text("\n".join(mine))
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
    """What the run directory shows of the computation."""
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
    """(name, hash of dtype, shape and bytes) of every tensor, without reading them through a library."""
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    for name, entry in sorted(json.loads(content[8 : 8 + length]).items()):
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            described = f"{entry['dtype']}{entry['shape']}".encode()
            digest = hashlib.sha256(described + content[8 + length + begin : 8 + length + end])
            yield name, digest.hexdigest()[:16]


def machine() -> str:
    """What two processes must have in common to compute the same bits: processor and libraries."""
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


# --- comparison ---------------------------------------------------------------------------------------------------------


def deviations(old: Outcome, new: Outcome) -> list[str]:
    """A line for each thing that differs and may not."""
    found = []
    if old.exit_code != new.exit_code:
        found.append(f"exit code {old.exit_code} -> {new.exit_code}: {last_lines(new.log)}")
    if [asked_about(one) for one in old.problems] != [asked_about(one) for one in new.problems]:
        found.append(f"problems {[*map(asked_about, old.problems)]} -> {[*map(asked_about, new.problems)]}")
    for name in ("metrics", "samples"):
        before, after = getattr(old, name), getattr(new, name)
        if len(before) != len(after):
            found.append(f"{len(before)} -> {len(after)} rows of {name}")
        for one, other in zip(before, after, strict=False):
            found += [f"{name} of step {one.get('step')}: {line}" for line in differences(one, other)]
    found += [f"export: {line}" for line in differences(old.export, new.export)]
    return found


def asked_about(problem: Mapping[str, str]) -> tuple[str, str]:
    return problem.get("where", ""), problem.get("value", "")


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    names = [name for name in {**old, **new} if old.get(name, "absent") != new.get(name, "absent")]
    return [f"{name}: {str(old.get(name, 'absent'))[:80]} -> {str(new.get(name, 'absent'))[:80]}" for name in names]


def last_lines(log: str) -> str:
    return " | ".join(log.strip().splitlines()[-3:])


def wording(case: Case, old: Outcome, new: Outcome) -> str:
    """The changed texts of errors and of model cards, as a diff."""

    def lines(outcome: Outcome) -> list[str]:
        reported = [
            f"{one.get('where')}: {one.get('reason', one.get('message'))} | {one.get('fix')}"
            for one in outcome.problems
        ]
        return reported + [line for text in outcome.texts.values() for line in text.splitlines()]

    title = f"{case.name}: {shlex.join(case.argv)}" if not case.ranks else case.name
    return "\n".join(difflib.unified_diff(lines(old), lines(new), title, title, lineterm="", n=0))


def compare(trees: tuple[Tree, Tree], cases: Sequence[Case], chosen: argparse.Namespace) -> int:
    old, new = trees
    wrong: dict[str, list[str]] = {}
    trained = refused = failed = 0
    texts: list[str] = []
    for number, case in enumerate(cases, 1):
        before, after = old.run(case, again=False), new.run(case, again=not chosen.resume)
        found = deviations(before, after)
        failed += (fails := case.ranks > 0 and before.exit_code not in (0, 2))
        trained += case.ranks > 0 and before.exit_code == 0
        refused += before.exit_code == 2
        if diff := wording(case, before, after):
            texts.append(diff)
        if found:
            wrong[case.name] = found
        mark = (
            "DIFFERS" if found else "FAILS in both" if fails else "equal" if before.exit_code == 0 else "refused alike"
        )
        print(f"{number}/{len(cases)} {case.name}: {mark} ({before.seconds} s, {after.seconds} s)", flush=True)
        for line in found[:4] or [last_lines(before.log)] * fails:
            print(f"    {line}", flush=True)
    (chosen.work / "wording.diff").write_text("\n".join(texts) + "\n")
    summary = {"cases": len(cases), "trained": trained, "refused": refused, "failed": failed, "deviations": wrong}
    if chosen.report:
        chosen.report.write_text(json.dumps(summary, indent=1) + "\n")
    print(
        f"{trained} runs trained, {refused} refused, {len(wrong)} differ; {len(texts)} wordings changed (wording.diff)"
    )
    return 1 if wrong else 0


def main() -> int:
    if sys.argv[1:2] == ["--serve"]:
        serve(Path(sys.argv[2]), Path(sys.argv[3]))
        return 0
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--work", type=Path, required=True, help="folder for inputs and results")
    parser.add_argument("--only", default="", help="words that the name of a case has: a task, a method, a variant")
    parser.add_argument("--stages", default="0,1,2,3")
    parser.add_argument("--ranks", type=int, default=1, help="of stages 2 and 3")
    parser.add_argument("--rotate", action="store_true", help="each pair at one stage")
    parser.add_argument("--no-runs", action="store_true")
    parser.add_argument("--no-errors", action="store_true")
    parser.add_argument("--resume", action="store_true", help="use results of the new tree that are there")
    parser.add_argument("--report", type=Path, help="write the deviations as JSON")
    chosen = parser.parse_args()
    chosen.work = chosen.work.absolute()
    chosen.work.mkdir(parents=True, exist_ok=True)
    make_inputs(chosen.work)
    trees = []
    for name, tree in (("old", chosen.old), ("new", chosen.new)):
        trees.append(Tree(tree.resolve(), chosen.work / name, models=chosen.work / "models"))
    stages = [int(stage) for stage in chosen.stages.split(",")]
    only = [word for word in chosen.only.split(",") if word]
    cases: list[Case] = []
    if not chosen.no_runs:
        cases += pairs(only, stages, chosen.ranks, chosen.work, rotate=chosen.rotate)
    if not chosen.no_errors and not only:
        cases += wrong_configurations()
    try:
        return compare((trees[0], trees[1]), cases, chosen)
    finally:
        for tree in trees:
            tree.close()


if __name__ == "__main__":
    sys.exit(main())
