"""Every architecture of transformers, trained by dstune and by a plain loop: trained alike, refused before training, or wrong.

python benchmarks/architectures.py run STATE.jsonl [--kinds llama,gemma3] [--part 3/8] [--every-case]
python benchmarks/architectures.py write STATE.jsonl      # benchmarks/architectures.json and docs/architectures.md

A pair of processes trains tiny checkpoints one after another. `STATE.jsonl` has a line for each case that is done; started again,
`run` goes on after the last one. A case that ends a process, or takes longer than five minutes, is noted and the next one gets a
new pair.

The plain loop has each sample alone in a forward pass: nothing is packed, padded, masked or partitioned.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "benchmarks")]

TABLE, PAGE = ROOT / "benchmarks" / "architectures.json", ROOT / "docs" / "architectures.md"
PATIENCE = 300
"""Seconds for a case."""
LOSS, UPDATE, LOGITS = 1e-5, 2e-4, 2e-4
"""Largest relative differences of what counts as equal: in losses (ten times that in gradient norms), in the change of all weights,
and in logits of the export that is loaded again. What is equal differs by rounding in fp32: docs/architectures.md says how much."""

GROUPS = {
    "causal": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "classification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "seq2seq": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
}
FEWER = {
    "causal": (("full", True, 3), ("lora", False, 3), ("full", False, 0), ("lora", True, 0)),
    "classification": (("full", False, 3), ("lora", False, 0)),
    "seq2seq": (("full", False, 3), ("lora", False, 3), ("full", False, 0)),
}
"""(method, packed, ZeRO stage): each value with each other one, or nearly so."""


USUAL = [
    "llama",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "qwen3_5",
    "qwen3_5_moe",
    "qwen3_5_text",
    "qwen3_next",
    "gemma2",
    "gemma3",
    "gemma3_text",
    "gemma4",
    "gemma4_text",
    "mistral",
    "ministral3",
    "mixtral",
    "gpt_oss",
    "glm4",
    "glm4_moe",
    "glm4_moe_lite",
    "glm_moe_dsa",
    "smollm3",
    "olmo2",
    "olmo3",
    "granite",
    "granitemoehybrid",
    "lfm2",
    "lfm2_moe",
    "nemotron",
    "nemotron_h",
    "phi",
    "phi3",
    "phimoe",
    "llama4",
    "llama4_text",
    "kimi_linear",
    "minimax",
    "minimax_m2",
    "deepseek_v2",
    "deepseek_v3",
    "deepseek_v32",
    "deepseek_v4",
    "gpt2",
    "gpt_neox",
    "falcon",
    "falcon_h1",
    "bloom",
    "opt",
    "mamba",
    "mamba2",
    "jamba",
    "cohere2",
    "ernie4_5",
    "ernie4_5_moe",
    "exaone4",
    "hunyuan_v1_dense",
    "seed_oss",
    "starcoder2",
    "bert",
    "roberta",
    "xlm-roberta",
    "modernbert",
    "deberta-v2",
    "distilbert",
    "electra",
    "albert",
    "eurobert",
    "t5",
    "mt5",
    "bart",
    "mbart",
    "pegasus",
    "t5gemma",
    "marian",
    "m2m_100",
]
"""Those that people train today come first."""


@dataclass(frozen=True)
class Case:
    group: str
    kind: str
    method: str
    packed: bool
    stage: int

    @property
    def name(self) -> str:
        return f"{self.group}-{self.kind}-{self.method}-{'packed' if self.packed else 'padded'}-{self.stage}"


def all_cases(kinds: list[str] | None, part: str | None, every: bool) -> list[Case]:
    """The first combination of every kind, then the second of every kind, and so on.

    kinds: GROUP:KIND or KIND. part: `3/8` is the third
    of eight."""
    from transformers.models.auto import modeling_auto

    found = [
        (group, kind)
        for group, mapping in GROUPS.items()
        for kind in getattr(modeling_auto, mapping)
        if kinds is None or kind in kinds or f"{group}:{kind}" in kinds
    ]
    found.sort(key=lambda pair: pair[1] not in USUAL)
    if part:
        number, parts = map(int, part.split("/"))
        found = found[number - 1 :: parts]
    chosen = {group: every_combination(group) if every else FEWER[group] for group in GROUPS}
    return [
        Case(group, kind, *chosen[group][turn])
        for turn in range(max(map(len, chosen.values())))
        for group, kind in found
        if turn < len(chosen[group])
    ]


def every_combination(group: str) -> tuple[tuple[str, bool, int], ...]:
    packings = (False, True) if group == "causal" else (False,)
    return tuple((method, packed, stage) for method in ("full", "lora") for packed in packings for stage in (0, 3))


# -- in a rank ---------------------------------------------------------------------------------------------------------


def model_class_of(case: Case, config: Any) -> Any:
    """The class that a published checkpoint of this configuration names."""
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForMultimodalLM,
        AutoModelForSeq2SeqLM,
        AutoModelForSequenceClassification,
    )

    if case.group == "classification":
        return AutoModelForSequenceClassification
    if case.group == "seq2seq":
        return AutoModelForSeq2SeqLM
    if getattr(config, "text_config", None) is not None and type(config) in AutoModelForMultimodalLM._model_mapping:
        return AutoModelForMultimodalLM
    return AutoModelForCausalLM


class Unbuilt(Exception):
    """The architecture has no tiny checkpoint."""


def checkpoint(case: Case, folder: Path) -> Path:
    """The tiny checkpoint of a kind."""
    from support.tiny import save_tokenizer
    from tiny_architectures import build, small_config

    if (folder / "done").is_file():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    try:
        config = small_config(case.kind)
        if case.group == "classification":
            config.id2label, config.label2id = {0: "left", 1: "right"}, {"left": 0, "right": 1}
            config.num_labels = 2
            if getattr(config, "pad_token_id", None) is None:
                config.pad_token_id = 2
        model = build(model_class_of(case, config), config)
        elements = sum(parameter.numel() for parameter in model.parameters())
        if elements > 20_000_000:
            raise Unbuilt(f"{elements:,} weights are left")
        model.save_pretrained(folder)
    except Unbuilt:
        raise
    except Exception as error:
        raise Unbuilt(f"{type(error).__name__}: {first_line(error)}") from error
    save_tokenizer(folder)
    (folder / "done").touch()
    return folder


def first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:300]


def overrides(case: Case, folder: Path, data: Path, run_dir: Path) -> list[str]:
    from support.workshop import AT_THE_END, PLAIN

    tasks = {"causal": "chat", "classification": "classification", "seq2seq": "seq2seq"}
    more = []
    if case.group == "seq2seq":
        more = ["data.columns.source=source", "data.columns.target=target"]
    if case.method == "lora":
        more += ["method.rank=4", "method.alpha=8"]
    rows = 2 if case.packed else 4
    return [
        *PLAIN,
        *AT_THE_END,
        f"task={tasks[case.group]}",
        f"model.path={folder}",
        f"data.train={data / case.group}.jsonl",
        f"run.dir={run_dir}",
        f"method={case.method}",
        f"data.packing={str(case.packed).lower()}",
        f"zero=stage{case.stage}",
        "data.max_length=96",
        "optimizer.lr=1e-2",
        f"trainer.micro_batch_size={rows // 2}",
        f"trainer.global_batch_size={rows}",
        "trainer.max_steps=2",
        *more,
    ]


def run_case(case: Case, world: Any, work: Path) -> dict[str, Any]:
    """Train, then on rank 0 compare. Raises UserError where dstune refuses."""
    from dstune.config.compose import compose
    from dstune.config.run_file import read_run, write_run
    from dstune.core.errors import UserError
    from dstune.rank import worker

    folder, run_dir = work / "models" / f"{case.group}-{case.kind}", work / "run"
    problem = ""
    if world.is_main:
        try:
            checkpoint(case, folder)
            shutil.rmtree(run_dir, ignore_errors=True)
            run_dir.mkdir()
            write_run(run_dir / "run.yaml", compose(overrides(case, folder, work, run_dir)))
        except Unbuilt as error:
            problem = f"unbuilt: {error}"
        except UserError as error:
            problem = f"refused: {error.problems[0].reason}"
    if problem := world.broadcast(problem):
        status, _, reason = problem.partition(": ")
        return {"status": status, "reason": reason}
    config = read_run(run_dir / "run.yaml").config
    with disturbed_adapters(run_dir / "start"):
        worker.train(config, run_dir, world)
    return compare(case, config, folder, run_dir) if world.is_main else {}


@contextmanager
def disturbed_adapters(folder: Path) -> Iterator[None]:
    """Give adapters a second matrix that is not zero before a run trains them, so that the first one has a gradient too. `folder`
    gets what is trained as it is then."""
    import torch

    from dstune.rank.setup import Setup
    from dstune.zero.parts import full_shape, gathered, is_partitioned

    build_engine = Setup.build_engine

    def build(setup: Any, layout: Any, built: Any, method: Any) -> Any:
        start = {}
        if hasattr(built.module, "peft_config"):
            for number, (name, parameter) in enumerate(built.module.named_parameters()):
                if not parameter.requires_grad:
                    continue
                with gathered([parameter], modified_by_rank=0), torch.no_grad():
                    # A part of a partitioned one is sent by rank 0; a whole one every rank changes alike.
                    if ".lora_B." in name and (setup.world.is_main or not is_partitioned(parameter)):
                        noise = torch.Generator().manual_seed(number)
                        parameter.copy_(torch.randn(full_shape(parameter), generator=noise) * 0.05)
                    start[name] = parameter.detach().clone()
            if setup.world.is_main:
                built.module.peft_config["default"].save_pretrained(folder)
                torch.save(start, folder / "start.pt")
        return build_engine(setup, layout, built, method)

    Setup.build_engine = build  # type: ignore[method-assign]
    try:
        yield
    finally:
        Setup.build_engine = build_engine  # type: ignore[method-assign]


def compare(case: Case, config: Any, folder: Path, run_dir: Path) -> dict[str, Any]:
    import torch

    torch.set_grad_enabled(True)
    plain, start, losses, norms = train_plainly(case, config, folder, run_dir / "start")
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "loss" in row]
    found: dict[str, Any] = {
        "loss": max(relative(row["loss"], loss) for row, loss in zip(rows, losses, strict=True)),
        "norm": max(relative(row["grad_norm"], norm) for row, norm in zip(rows, norms, strict=True)),
    }
    exported = load_export(case, folder, run_dir / "export")
    trained = dict(exported.named_parameters())
    missing = sorted(name for name in plain_changes(plain) if name not in trained)
    moved = apart = 0.0
    worst, worst_name = 0.0, ""
    for name, parameter in plain_changes(plain).items():
        if name in missing:
            continue
        change = parameter.detach().double() - start[name].double()
        difference = float((trained[name].detach().double() - parameter.detach().double()).square().sum())
        moved += float(change.square().sum())
        apart += difference
        share = math.sqrt(difference / max(float(change.square().sum()), 1e-20))
        if difference > 1e-16 and share > worst:
            worst, worst_name = share, name
    found |= {"update": math.sqrt(apart / max(moved, 1e-30)), "worst": worst, "worst_tensor": worst_name}
    found |= {
        "moved": math.sqrt(moved),
        "missing": missing,
        "trained": sum(map(torch.numel, plain_changes(plain).values())),
    }
    found["logits"] = logits_apart(case, config, plain, exported)
    found["class"] = type(exported if case.method == "full" else exported.get_base_model()).__name__
    if case.method == "lora":
        found["checkpoint_names"] = named_as_checkpoint(folder, run_dir / "export")
    bad = [
        key
        for key, limit in (("loss", LOSS), ("norm", 10 * LOSS), ("update", UPDATE), ("logits", LOGITS))
        if not found[key] <= limit
    ]
    if missing:
        bad.append("missing")
    found["status"] = "wrong" if bad else "equal"
    if bad:
        found["reason"] = ", ".join(f"{key} {found[key]}" for key in bad)
    return found


def plain_changes(model: Any) -> dict[str, Any]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def relative(found: float, expected: float) -> float:
    return abs(found - expected) / max(abs(expected), 1e-12) if math.isfinite(found) else math.inf


def load_plain(case: Case, folder: Path) -> Any:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder)
    return model_class_of(case, config).from_pretrained(folder, dtype="float32")


def load_export(case: Case, folder: Path, export: Path) -> Any:
    import peft

    if case.method == "full":
        return load_plain(case, export)
    return peft.PeftModel.from_pretrained(load_plain(case, folder), export, is_trainable=True)


def samples_of(config: Any) -> Iterator[list[dict[str, Any]]]:
    """The samples of each step."""
    from dstune.core.paths import cache_root
    from dstune.core.rank_env import RankEnv
    from dstune.data.build import prepare
    from dstune.models.load import load_tokenizer
    from dstune.trainer.data_loader import order_of

    tokenizer = load_tokenizer(config.model)
    data = prepare(config, tokenizer, RankEnv(0, 1, 0, 1, "plain"), cache_root())
    order = order_of(config, data.train)
    for step in range(2):
        global_batch = order.global_batch(*order.locate(step))
        yield [
            data.train.sample(index) for part in global_batch.micro_batches if not part.filler for index in part.samples
        ]


def loss_of(case: Case, model: Any, sample: dict[str, Any]) -> tuple[Any, int]:
    import torch
    import torch.nn.functional as functional

    ids = torch.as_tensor(sample["input_ids"]).long()[None]
    if case.group == "classification":
        label = torch.as_tensor(sample["label"] if "label" in sample else sample["labels"]).long().reshape(1)
        return functional.cross_entropy(model(input_ids=ids).logits.float(), label, reduction="sum"), 1
    labels = torch.as_tensor(sample["target_ids" if case.group == "seq2seq" else "labels"]).long()[None]
    if case.group == "seq2seq":
        logits = model(input_ids=ids, labels=labels, use_cache=False).logits.float()
        return functional.cross_entropy(logits[0], labels[0], reduction="sum"), labels.numel()
    logits = model(input_ids=ids, use_cache=False).logits.float()
    expected = labels[0, 1:]
    loss = functional.cross_entropy(logits[0, :-1], expected, ignore_index=-100, reduction="sum")
    return loss, int((expected != -100).sum())


def train_plainly(
    case: Case, config: Any, folder: Path, adapter: Path
) -> tuple[Any, dict[str, Any], list[float], list[float]]:
    """Two steps of SGD, each sample alone: the model, its weights at the start, losses and gradient norms."""
    import peft
    import torch

    model = load_plain(case, folder)
    if case.method == "lora":
        settings = peft.LoraConfig.from_pretrained(adapter)
        settings.inference_mode = False
        model = peft.get_peft_model(model, settings)
        missing = set(plain_changes(model)) ^ set(begin := torch.load(adapter / "start.pt"))
        if missing:
            raise RuntimeError(f"{sorted(missing)[:3]} are trained in one of the two models alone")
        model.load_state_dict(begin, strict=False)
    model.train()
    start = {name: parameter.detach().clone() for name, parameter in plain_changes(model).items()}
    losses, norms = [], []
    for samples in samples_of(config):
        parts = [loss_of(case, model, sample) for sample in samples]
        loss = sum(part for part, _ in parts) / sum(count for _, count in parts)
        model.zero_grad()
        loss.backward()
        chosen = [parameter for parameter in model.parameters() if parameter.grad is not None]
        losses.append(float(loss.detach()))
        norms.append(float(torch.nn.utils.get_total_norm([parameter.grad for parameter in chosen])))
        with torch.no_grad():
            for parameter in chosen:
                parameter -= config.optimizer.lr * parameter.grad
    return model, start, losses, norms


def logits_apart(case: Case, config: Any, plain: Any, exported: Any) -> float:
    import torch

    sample = next(iter(samples_of(config)))[0]
    ids = torch.as_tensor(sample["input_ids"]).long()[None]
    more = {"labels": torch.as_tensor(sample["target_ids"]).long()[None]} if case.group == "seq2seq" else {}
    with torch.no_grad():
        left, right = (model.eval()(input_ids=ids, **more).logits.float() for model in (plain, exported))
    return float((left - right).abs().max() / left.abs().max())


def named_as_checkpoint(folder: Path, export: Path) -> float:
    """Share of the adapter's modules that the base's files have a weight of under the same name, as servers look them up."""
    from safetensors.torch import load_file

    adapter = load_file(export / "adapter_model.safetensors")
    adapted = {key.removeprefix("base_model.model.").rpartition(".lora_")[0] for key in adapter if ".lora_" in key}
    weights = {key.removesuffix(".weight") for key in load_file(folder / "model.safetensors")}
    return sum(name in weights for name in adapted) / max(1, len(adapted))


def rank_main(arguments: list[str]) -> None:
    """On each rank: the cases of a file, one after another; rank 0 notes each in the state."""
    import warnings

    warnings.filterwarnings("ignore")
    import transformers
    from support.ranks import start_rank

    from dstune.core.errors import UserError

    cases, state, work = json.loads(Path(arguments[0]).read_text()), Path(arguments[1]), Path(arguments[2])
    transformers.logging.set_verbosity_error()
    world = start_rank()
    for number, values in enumerate(cases):
        case = Case(**values)
        begin = time.perf_counter()
        if world.is_main:
            note(state, case, {"status": "begun"})
        fatal = False
        try:
            result = run_case(case, world, work)
        except UserError as error:
            result = {"status": "refused", "reason": error.problems[0].reason, "where": error.problems[0].where}
        except Exception as error:
            fatal = True
            where = traceback.extract_tb(error.__traceback__)[-1]
            place = f"{Path(where.filename).name}:{where.lineno}"
            result = {"status": "error", "reason": f"{type(error).__name__} at {place}: {first_line(error)}"}
            traceback.print_exc()
        if world.is_main or (
            fatal and "torch" not in result["reason"].split(":")[0] and "c10d" not in result["reason"]
        ):
            note(state, case, result | {"seconds": round(time.perf_counter() - begin, 2)})
        if fatal:
            os._exit(1)
        gc.collect()
        if number == 0:
            gc.freeze()  # what was imported is looked through three times a case otherwise: half of the time
    os._exit(0)


def note(state: Path, case: Case, result: dict[str, Any]) -> None:
    with state.open("a") as stream:
        stream.write(json.dumps({"case": asdict(case), **result}) + "\n")


# -- the parent ---------------------------------------------------------------------------------------------------------


def read_state(state: Path) -> dict[str, dict[str, Any]]:
    """The last line of each case, by its name."""
    lines = state.read_text().splitlines() if state.is_file() else []
    entries = [json.loads(line) for line in lines]
    return {Case(**entry["case"]).name: entry for entry in entries}


def run(arguments: argparse.Namespace) -> None:
    from support.ranks import environment
    from support.tiny import write_dialogues, write_labelled, write_pairs

    from dstune.core.rendezvous import free_port

    state = arguments.state.resolve()
    cases = all_cases(arguments.kinds.split(",") if arguments.kinds else None, arguments.part, arguments.every_case)
    with tempfile.TemporaryDirectory(dir=arguments.work) as folder:
        work = Path(folder)
        write_dialogues(work / "causal.jsonl", 24, turns=(1, 2))
        write_labelled(work / "classification.jsonl", 16)
        write_pairs(work / "seq2seq.jsonl", 16)
        while left := [case for case in cases if case.name not in read_state(state)]:
            (work / "cases.json").write_text(json.dumps([asdict(case) for case in left]))
            port, ranks = free_port(), []
            for rank in range(2):
                command = [
                    sys.executable,
                    str(Path(__file__).resolve()),
                    "rank",
                    str(work / "cases.json"),
                    str(state),
                    folder,
                ]
                variables = environment(rank, 2, port) | {"DSTUNE_CACHE": str(work / "cache")}
                with (work / f"rank-{rank}.log").open("w") as log:
                    ranks.append(subprocess.Popen(command, env=variables, stdout=log, stderr=subprocess.STDOUT))
            watch(ranks, state, work)
    print(summary(read_state(state)))


def watch(ranks: list[subprocess.Popen[bytes]], state: Path, work: Path) -> None:
    """Wait for a pair; end it where a case ended one of them, or takes too long."""
    size, since = -1, time.monotonic()
    while any(rank.poll() is None for rank in ranks):
        now = state.stat().st_size if state.is_file() else 0
        if now != size:
            size, since = now, time.monotonic()
        stuck = time.monotonic() - since > PATIENCE
        if stuck or any(rank.returncode for rank in ranks):
            time.sleep(0 if stuck else 2)
            break
        time.sleep(0.2)
    for rank in ranks:
        rank.kill()
        rank.wait()
    for entry in list(read_state(state).values()):
        if entry["status"] == "begun":
            log = (work / "rank-0.log").read_text(errors="replace").splitlines() or [""]
            note(
                state, Case(**entry["case"]), {"status": "crashed", "reason": f"no answer; last line: {log[-1][:200]}"}
            )


# -- the table ----------------------------------------------------------------------------------------------------------

WORDS = {
    "equal": "trained",
    "refused": "refused",
    "wrong": "**differs**",
    "unbuilt": "not built",
    "error": "fails",
    "crashed": "fails",
}
COMBINATIONS = {
    "causal": "Causal language models (`task=chat`)",
    "classification": "Classifiers (`task=classification`)",
    "seq2seq": "Encoder-decoders (`task=seq2seq`)",
}


def write(state: Path) -> None:
    """Put what a state holds into the JSON file and the page."""
    from importlib.metadata import version

    entries = [entry for entry in read_state(state).values() if entry["status"] != "begun"]
    packages = ("transformers", "torch", "deepspeed", "peft")
    table = {"versions": {name: version(name) for name in packages}, "cases": sorted(entries, key=in_order)}
    TABLE.write_text(json.dumps(rounded(table), indent=1) + "\n")
    PAGE.write_text(page(json.loads(TABLE.read_text())))


def in_order(entry: dict[str, Any]) -> tuple[Any, ...]:
    case = entry["case"]
    return (list(GROUPS).index(case["group"]), case["kind"], case["method"], case["packed"], case["stage"])


def rounded(value: Any) -> Any:
    """Without what differs from run to run, and with two digits of each number."""
    if isinstance(value, dict):
        return {
            key: rounded(part)
            for key, part in value.items()
            if key not in ("seconds", "moved", "worst", "worst_tensor")
        }
    if isinstance(value, list):
        return [rounded(part) for part in value]
    if isinstance(value, str):
        return re.sub(r"/\S*/models/[a-z]+-", "", value)
    return float(f"{value:.1e}") if isinstance(value, float) else value


def page(table: dict[str, Any]) -> str:
    """docs/architectures.md, of the JSON file's table."""
    cases = table["cases"]
    count = {word: sum(WORDS[entry["status"]] == word for entry in cases) for word in dict.fromkeys(WORDS.values())}
    kinds = {(entry["case"]["group"], entry["case"]["kind"]) for entry in cases}
    equal = [entry for entry in cases if entry["status"] == "equal"]
    figures = {key: max((entry[key] for entry in equal), default=0.0) for key in ("loss", "norm", "update", "logits")}
    lines = [
        INTRODUCTION.format(
            versions=", ".join(f"{name} {number}" for name, number in table["versions"].items()),
            kinds=len(kinds),
            cases=len(cases),
            counts=", ".join(f"{number} {word}" for word, number in count.items() if number),
            **{key: f"{value:.0e}" for key, value in figures.items()},
        )
    ]
    for group, title in COMBINATIONS.items():
        combinations = sorted({combination(entry) for entry in cases if entry["case"]["group"] == group})
        if not combinations:
            continue
        lines += ["", f"## {title}", "", "| `model_type` | " + " | ".join(words for _, words in combinations) + " |"]
        lines.append("| --- |" + " --- |" * len(combinations))
        for kind in sorted(kind for of_group, kind in kinds if of_group == group):
            of_kind = {combination(e): e for e in cases if (e["case"]["group"], e["case"]["kind"]) == (group, kind)}
            cells = [WORDS[of_kind[key]["status"]] if key in of_kind else "not run" for key in combinations]
            lines.append(f"| `{kind}` | " + " | ".join(cells) + " |")
        reasons: dict[str, list[str]] = {}
        for entry in cases:
            if entry["case"]["group"] == group and entry["status"] != "equal":
                reason = f"{WORDS[entry['status']]}: {plainly(entry['reason'])}"
                names = reasons.setdefault(reason, [])
                if entry["case"]["kind"] not in names:
                    names.append(entry["case"]["kind"])
        lines += [
            "",
            *(f"- {reason} ({', '.join(f'`{n}`' for n in names)})" for reason, names in sorted(reasons.items())),
        ]
    return "\n".join(lines) + "\n"


def combination(entry: dict[str, Any]) -> tuple[int, str]:
    case = entry["case"]
    turn = FEWER[case["group"]].index((case["method"], case["packed"], case["stage"]))
    packing = ("packed, " if case["packed"] else "padded, ") if case["group"] == "causal" else ""
    return turn, f"{case['method']}, {packing}ZeRO-{case['stage']}"


def plainly(reason: str) -> str:
    """A reason without what belongs to one architecture, for a list of those that share it."""
    reason = re.sub(r"attention of \S+ crosses", "attention crosses", reason)
    reason = re.sub(r"\(logits differ by [^)]*\)", "(logits differ)", reason)
    return reason.replace("|", "\\|").replace("\n", " ")


INTRODUCTION = """\
# Architectures

Which architectures of transformers dstune trains, and which it refuses. `benchmarks/architectures.py` writes this page, with
{versions}.

Every architecture is built from the defaults of its configuration class, shrunk to some thousand weights, and trained for two steps
of SGD on two ranks. A plain loop trains the same checkpoint with each sample alone: nothing packed, padded, masked or partitioned.

- *trained*: losses, gradient norms, the change of all weights, and the logits of the export as transformers or peft load it are
  those of the plain loop.
- *refused*: `dstune train` ended with exit code 2 before the first step and said why.
- *fails*: an error with a traceback before the first step.
- *differs*: trained, and not as the plain loop. The reason is below the table.
- *not built*: the shrunk defaults of the class do not make a model that runs, so the architecture was not tested.
- *not run*: the same.

Packed rows of models whose attention chooses some tokens of a row (`index_topk`: `deepseek_v32`, `glm_moe_dsa`) had losses that
differed by 3e-3 and 6e-3. Such rows are refused since; padded ones are trained.

What the comparison sees is tried with twelve faults that are planted in a run of a tiny Llama after its sanity checks, such as a
head that is skipped, rotary embeddings that turn 1% faster, a target that is left out, or samples that see each other. It finds all
of them (`benchmarks/architecture_faults.py`). Twenty of the architectures are tried again in continuous integration
(`tests/unit/test_architectures.py`).

{kinds} architectures in {cases} cases: {counts}. The largest relative differences of what counts as trained: loss {loss}, gradient
norm {norm}, change of the weights {update}, logits {logits}."""


def summary(entries: dict[str, dict[str, Any]]) -> str:
    counts: dict[str, int] = {}
    for entry in entries.values():
        counts[entry["status"]] = counts.get(entry["status"], 0) + 1
    return json.dumps(counts)


def main() -> None:
    if sys.argv[1:2] == ["rank"]:
        rank_main(sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["run", "write"])
    parser.add_argument("state", type=Path)
    parser.add_argument("--kinds")
    parser.add_argument("--part")
    parser.add_argument("--every-case", action="store_true")
    parser.add_argument("--work", default=None)
    arguments = parser.parse_args()
    if arguments.action == "write":
        write(arguments.state)
    else:
        run(arguments)


if __name__ == "__main__":
    main()
