"""The verb `dstune models`: lists the models that a task can start from, where their weights are, the hardware that training takes,
and how good they are untuned."""

from __future__ import annotations

import io
import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from dstune import samples
from dstune.config.architectures import ENCODERS, size_problems
from dstune.config.compose import compose
from dstune.config.overrides import quoted
from dstune.config.presets import description, model_files
from dstune.config.ranges import check_ranges
from dstune.config.schema import ModelConfig, RunConfig, Selective
from dstune.core.arguments import VerbParser
from dstune.core.errors import EXIT_DONE, EXIT_PREEMPTED, DstuneError, Problem, UserError
from dstune.data.images.processor import FAMILIES
from dstune.evaluation import command as evaluate
from dstune.launch import hub
from dstune.launch import plan as planner
from dstune.planning import counted, source
from dstune.planning.architecture import is_known
from dstune.planning.hardware import Cluster
from dstune.planning.plan import effort
from dstune.planning.published import PUBLISHED
from dstune.planning.setup import head_of, labels_of
from dstune.protocols import TASKS, task_of
from dstune.protocols.task import TaskConfig

HELP = """\
usage: dstune models [FOLDER ...] [key=value ...] [hardware=8xH100-80G] [--hub WORDS] [--probe DATA] [--json]

List the models that a task can start from: packaged samples, presets (`model=NAME`), models in the hub's cache, and FOLDERs.
"smallest that fits" is the smallest ZeRO stage by `dstune plan` with one row at a time, on this machine or `hardware=`, `nodes=`.

  key=value       as for `dstune train`: task=classification method=lora data.max_length=512 ...
  --hub WORDS     also search the hub: the ten most downloaded models with these words in their name
  --probe DATA    evaluate every model on this machine, untuned, on the rows of DATA, and rank them
  --rows N        number of rows of DATA to evaluate (default 200)
  --json          one JSON list
"""

ENCODER_DECODERS = ("t5", "bart")
"""Architectures by `model_type`. All others that the planner knows are decoders."""

HUB_MODELS = 10
UNVERIFIED = "?"
"""Marks the licence of a model whose entry nobody compared with its page."""


@dataclass
class Model:
    """One line of the list."""

    choose: str
    """The override that chooses the model, to be typed after `dstune train`."""
    path: str
    origin: str
    """`sample`, `preset`, `published` (known to the planner), `cache`, `folder` or `hub`."""
    here: bool
    """Whether its weights are on this machine."""
    parameters: int | None = None
    context: int | None = None
    """Number of positions that it was made for; None if config.json does not say."""
    licence: str = ""
    modality: str = ""
    """Its inputs: `text` or `text, images`, and which of them it is trained on if not all; empty if that is not known."""
    year: int | None = None
    source: str = ""
    """Where licence, year and sizes of a published model were looked up; `unverified` if they were not."""
    gated: bool | None = None
    """Whether access must be requested; None if that is not known."""
    zero: str = ""
    """The smallest ZeRO stage that fits, and what it offloads to host memory."""
    score: float | None = None
    note: str = ""
    """Why there is no plan or no score."""


def main(argv: list[str]) -> int:
    """Run the verb. Raises UserError; returns the exit code."""
    if {"--help", "-h"} & set(argv):
        print(HELP, end="")
        return EXIT_DONE
    parser = VerbParser(prog="dstune models", add_help=False)
    parser.add_argument("words", nargs="*")
    parser.add_argument("--hub")
    parser.add_argument("--probe")
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_intermixed_args(argv)
    folders = [word for word in arguments.words if "=" not in word]
    settings = planner.parse([word for word in arguments.words if "=" in word])
    config = compose(settings.rest).config
    if problems := list(check_ranges(config)):
        raise UserError(problems)
    cluster = planner.cluster_of(config, settings)
    models = list(_all(folders, arguments.hub))
    _count_at_once(models, config)
    models = [model for model in models if _describe(model, config, cluster)]
    models.sort(key=lambda model: (not model.here, model.parameters or 0, model.choose))
    metric = ""
    if arguments.probe:
        metric = _probe(models, config, settings.rest, arguments.probe, arguments.rows)
    if arguments.json:
        print(json.dumps([asdict(model) | ({"metric": metric} if metric else {}) for model in models], indent=1))
    else:
        print(_table(models, config, cluster, metric))
    return EXIT_DONE


# ---- collecting the models ----


def _all(folders: Sequence[str], words: str | None) -> Iterator[Model]:
    """Yield every model once, under the shortest way to choose it."""
    model_by_path: dict[str, Model] = {}
    hub_models = _on_hub(words) if words else []
    for model in (*_samples(), *_presets(), *_published(), *_cached(), *_folders(folders), *hub_models):
        model_by_path.setdefault(model.path, model)
    for model in model_by_path.values():
        if (published := PUBLISHED.get(model.path)) is not None:
            model.licence, model.gated = model.licence or published.licence, published.gated
            model.modality, model.year = published.modality, published.year
            model.source = f"{published.source}, {published.verified}" if published.verified else "unverified"
        yield model


def _samples() -> Iterator[Model]:
    for sample in samples.available():
        if sample.kind == "model":
            is_downloaded = sample.path is not None
            yield Model(
                f"model.path={sample.uri}", sample.uri, "sample", is_downloaded, licence=sample.licence, gated=False
            )


def _presets() -> Iterator[Model]:
    for file in model_files():
        path = str(yaml.safe_load(file.read_text(encoding="utf-8"))["path"])
        if not samples.is_sample(path):
            gated = True if re.search(r"\bGated\b", description(file)) else None
            snapshot = _snapshot(path)
            yield Model(
                f"model={file.stem}", path, "preset", snapshot is not None, licence=_licence(snapshot), gated=gated
            )


def _published() -> Iterator[Model]:
    for path in PUBLISHED:
        yield Model(f"model.path={path}", path, "published", _snapshot(path) is not None)


def _cached() -> Iterator[Model]:
    folder = source.hub_cache()
    for entry in sorted(folder.glob("models--*")) if folder.is_dir() else []:
        path = entry.name.removeprefix("models--").replace("--", "/")
        if (snapshot := _snapshot(path)) is not None:
            # `gated` stays unknown: whoever has the files has access anyway.
            yield Model(f"model.path={path}", path, "cache", True, licence=_licence(snapshot))


def _folders(paths: Sequence[str]) -> Iterator[Model]:
    for path in paths:
        if not (Path(path) / "config.json").is_file():
            reason = "there is no config.json in it" if Path(path).is_dir() else "there is no such folder"
            raise UserError(Problem("FOLDER", reason, "give a folder in Hugging Face layout", path))
        yield Model(f"model.path={path}", path, "folder", True, licence=_licence(Path(path)), gated=False)


def _on_hub(words: str) -> list[Model]:
    """Search the hub for models. Raises UserError if the hub cannot be reached."""
    if hub.is_offline():
        raise UserError(Problem("--hub", "HF_HUB_OFFLINE is set", "leave --hub out, or unset it", words))
    from huggingface_hub import HfApi, hf_hub_download

    try:
        listed = list(HfApi().list_models(search=words, sort="downloads", limit=HUB_MODELS, full=True, cardData=True))
    except Exception as error:  # classes differ among the releases of huggingface_hub and its HTTP libraries
        if not hub.is_connection_problem(error):
            raise
        reason = f"the hub cannot be reached ({type(error).__name__})"
        raise UserError(Problem("--hub", reason, "leave --hub out, or check the connection", words)) from error
    models = []
    for info in listed:
        card = info.card_data.to_dict() if info.card_data else {}
        model = Model(f"model.path={info.id}", info.id, "hub", _snapshot(info.id) is not None)
        model.licence, model.gated = str(card.get("license") or ""), bool(info.gated)
        try:
            hf_hub_download(info.id, "config.json")  # a few kB, for the planner
        except Exception as error:  # as above
            model.note = f"its config.json cannot be downloaded ({type(error).__name__})"
        models.append(model)
    return models


def _snapshot(path: str) -> Path | None:
    """Return the folder of a hub model in the cache; None if its weights are not there."""
    folder = source.cached_snapshot(ModelConfig(path=path))
    return folder if folder is not None and any(folder.glob("*.safetensors")) else None


def _licence(folder: Path | None) -> str:
    """Return the licence in the front matter of the model card; empty if there is none."""
    try:
        text = (folder / "README.md").read_text(encoding="utf-8") if folder else ""
    except (OSError, UnicodeDecodeError):
        return ""
    header = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
    licence = re.search(r"^license:\s*(\S+)", header[1], re.MULTILINE) if header else None
    return licence[1] if licence else ""


# ---- what training takes ----


def _count_at_once(models: Sequence[Model], config: RunConfig) -> None:
    """Count the weights of all models without a closed form in one child process, since each child takes seconds to start."""
    uncounted = []
    for model in models:
        with suppress(UserError):
            model_config = replace(config.model, path=model.path, revision=None, chat_template=None)
            config_json = source.whole_config_json(model_config)
            if not is_known(source.config_json(model_config)) and not size_problems(config_json):
                uncounted.append(config_json)
    with suppress(UserError):
        counted.count(uncounted, head_of(config), labels_of(config))


def _describe(model: Model, config: RunConfig, cluster: Cluster) -> bool:
    """Fill in what `config.json` and the planner say about a model. Returns whether the task can start from it."""
    # One row at a time, because the question is whether the model fits at all, not how fast it trains.
    run_config = replace(
        config,
        model=replace(config.model, path=model.path, revision=None, chat_template=None),
        trainer=replace(config.trainer, micro_batch_size=1, global_batch_size=1),
    )
    try:
        values = source.config_json(run_config.model)
    except UserError as error:
        model.note = model.note or error.problems[0].reason
        return model.origin != "cache"  # a cache also contains adapters and files of other tools
    kind = str(values.get("model_type"))
    config_json = source.whole_config_json(run_config.model)
    if not model.modality and config_json.get("vision_config"):
        model.modality = (
            "text, images" if config_json.get("model_type") in FAMILIES else "text, images (trained on text)"
        )
    published = PUBLISHED.get(model.path)
    if not _suits(kind, config.task) or (published and published.use != "chat" and task_of(config.task).generates):
        return False
    lengths = (values.get(key) for key in ("max_position_embeddings", "n_positions"))
    model.context = published.context if published is not None else None
    if model.context is None:
        model.context = next((length for length in lengths if type(length) is int and length > 0), None)
    try:
        estimate = planner.planned(run_config, cluster)
    except DstuneError as error:
        model.note = f"no plan: {getattr(error, 'problems', [error])[0]}".splitlines()[0]
        return True
    model.parameters = estimate.setup.model.parameters
    smallest = min(
        (choice for choice in estimate.plan.choices if choice.fits),
        key=lambda choice: (choice.offload != "none", choice.setup.stage, effort(choice.checkpointing)),
        default=None,
    )
    if smallest is None:
        model.zero = "none fits"
        return True
    model.zero = smallest.zero.replace("stage", "ZeRO-")
    if smallest.offload != "none":
        model.zero += f" + offload of {smallest.offload.replace('+', ' and ')}"
    if effort(smallest.checkpointing) > effort(config.trainer.activation_checkpointing):
        model.zero += f", activations {'selectively ' * isinstance(smallest.checkpointing, Selective)}checkpointed"
    return True


def _suits(kind: str, task: TaskConfig) -> bool:
    if kind in ENCODER_DECODERS:
        return task_of(task).encoder_decoder
    if kind in ENCODERS:
        return not task_of(task).generates
    return True


# ---- evaluating them untuned ----


def _probe(models: list[Model], config: RunConfig, overrides: list[str], data: str, rows: int) -> str:
    """Evaluate the models on this machine and sort all models by their score, the best first. Returns the metric.

    Raises UserError if untuned models have no answers to the task, or if no model could be evaluated.
    """
    ranked_by = task_of(config.task).ranked_by
    if not ranked_by:
        reason = f"an untuned model has no answers to task={config.task.name}"
        *others, last = (name for name, cls in TASKS.classes().items() if cls.ranked_by)
        raise UserError(Problem("--probe", reason, f"task={', '.join(others)} or {last}", data))
    measured: dict[str, dict[str, float]] = {}
    for model in models:
        if not model.here:
            model.note = model.note or "not evaluated: its weights are not on this machine"
            continue
        print(f"evaluating {model.path}", file=sys.stderr, flush=True)
        try:
            measured[model.path] = _measure_untuned(model, config, overrides, data, rows)
        except UserError as error:
            model.note = f"not evaluated: {error.problems[0].reason}"
    if not measured:
        reasons = "; ".join(f"{model.path}: {model.note}" for model in models if model.here)
        reason = f"no model could be evaluated ({reasons})" if reasons else "no model of the task is on this machine"
        raise UserError(Problem("--probe", reason, "dstune samples smollm2, or a FOLDER", data))
    metric, less = next(
        (name, less) for name, less in ranked_by if all(name in metrics for metrics in measured.values())
    )
    for model in models:
        model.score = measured.get(model.path, {}).get(metric)
    models.sort(key=lambda model: (model.score is None, (model.score or 0.0) * (1 if less else -1)))
    return metric


def _measure_untuned(model: Model, config: RunConfig, overrides: list[str], data: str, rows: int) -> dict[str, float]:
    """Return the metrics of the untuned model by `dstune evaluate MODEL`, with `--shots 0` for tasks that need a prompt.

    Raises UserError if it cannot be evaluated, DstuneError if a signal stopped the evaluation.
    """
    words = [*overrides, f"data.validation={quoted(data)}", f"evaluate.max_rows={rows}", "data.packing=false"]
    if not config.data.train:
        words.append("data.clean.leaks=false")
    shots = ["--shots", "0"] if task_of(config.task).few_shot else []
    printed = io.StringIO()
    with redirect_stdout(printed):
        code = evaluate.run_command([model.path, *words, *shots, "--json"])
    if code == EXIT_PREEMPTED:  # the signal means the verb, not only this model
        raise DstuneError(f"stopped while {model.path} was evaluated")
    if code != EXIT_DONE:
        raise UserError(Problem("--probe", f"dstune evaluate ended with exit code {code}", "see above", model.path))
    result: dict[str, Any] = json.loads(printed.getvalue().splitlines()[-1])
    metrics: dict[str, float] = result["prompted"][0]["metrics"] if "prompted" in result else result["metrics"]
    return metrics


def _table(models: list[Model], config: RunConfig, cluster: Cluster, metric: str) -> str:
    """Return the list as text. metric: the name of the score; empty without `--probe`."""
    nodes = f"{cluster.nodes} nodes of " if cluster.nodes > 1 else ""
    head = f"task={config.task.name} method={config.method.name}, {nodes}{cluster.per_node} x {cluster.device.name}"
    columns = [
        "",
        "here",
        "parameters",
        "context",
        "licence",
        "gated",
        "year",
        "reads",
        "smallest that fits",
        *([metric] if metric else []),
    ]
    lines = [columns]
    for model in models:
        gated = "" if model.gated is None else "yes" if model.gated else "no"
        size = "" if model.parameters is None else f"{model.parameters / 1e6:,.0f}M"
        cells = [model.choose, "yes" if model.here else "", size, f"{model.context:,}" if model.context else ""]
        cells += [
            model.licence + UNVERIFIED * (model.source == "unverified"),
            gated,
            str(model.year or ""),
            model.modality,
            model.zero or model.note,
        ]
        if metric:
            cells.append(model.note if model.score is None else f"{model.score:.4f}")
        lines.append(cells)
    widths = [max(len(line[column]) for line in lines) for column in range(len(columns))]
    right_aligned = {2, 3}
    rows = []
    for line in lines:
        padded = [
            cell.rjust(widths[at]) if at in right_aligned else cell.ljust(widths[at]) for at, cell in enumerate(line)
        ]
        rows.append("  ".join(padded).rstrip())
    unverified = any(model.source == "unverified" for model in models)
    mark = f"; {UNVERIFIED}: licence, year and context from memory, read the model's page" if unverified else ""
    advice = "" if os.environ.get("HF_HUB_OFFLINE") else "; --hub WORDS also searches the hub"
    return "\n".join([head, *rows, f"{len(models)} models{mark}{advice}"])
