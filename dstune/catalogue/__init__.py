"""The verb `dstune models`: what a task can start from, whether it is here, what it takes, and how good it is untuned."""

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
from dstune.config.architectures import size_problems
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
from dstune.planning.published_today import TODAY
from dstune.planning.setup import head_of, labels_of
from dstune.protocols import TASKS, task_of
from dstune.protocols.task import TaskConfig

HELP = """\
usage: dstune models [FOLDER ...] [key=value ...] [hardware=8xH100-80G] [--hub WORDS] [--probe DATA] [--json]

Models that a task can start from: the packaged samples, the prepared ones (`model=NAME`), those in the hub's cache, and
FOLDERs. The smallest ZeRO is that of `dstune plan`, with one row at a time, for this machine or for `hardware=` and `nodes=`.

  key=value       as for `dstune train`: task=classification method=lora data.max_length=512 ...
  --hub WORDS     ask the hub too, for the ten most downloaded models with these words in their name
  --probe DATA    ask every model that is on this machine, untuned, on the rows of DATA, and rank them
  --rows N        rows of DATA that are asked (default 200)
  --json          one JSON list
"""

ENCODERS = ("bert", "roberta", "xlm-roberta", "deberta-v2", "modernbert")
ENCODER_DECODERS = ("t5", "bart")
"""By `model_type`; what the planner knows beside them are decoders."""

PUBLISHED = {model.path: model for model in TODAY}
HUB_MODELS = 10


@dataclass
class Model:
    """One line of the list."""

    choose: str
    """What to type behind `dstune train`."""
    path: str
    origin: str
    """`sample`, `preset`, `published` (known to the planner), `cache`, `folder` or `hub`."""
    here: bool
    """Whether its weights are on this machine."""
    parameters: int | None = None
    context: int | None = None
    """Positions that it was made for; None where config.json names none."""
    licence: str = ""
    modality: str = ""
    """What it reads: `text`, `text, images`, with what of that it is trained on where that is less; empty where nobody has said."""
    year: int | None = None
    source: str = ""
    """Where licence, year and sizes of a model that is not here were read; `unverified` where they were not."""
    gated: bool | None = None
    """Whether access has to be granted; None where nobody has said."""
    zero: str = ""
    """The smallest ZeRO stage that fits, with what has to lie in host memory."""
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
    models = [model for model in models if _described(model, config, cluster)]
    models.sort(key=lambda model: (not model.here, model.parameters or 0, model.choose))
    metric = ""
    if arguments.probe:
        metric = _probe(models, config, settings.rest, arguments.probe, arguments.rows)
    if arguments.json:
        print(json.dumps([asdict(model) | ({"metric": metric} if metric else {}) for model in models], indent=1))
    else:
        print(_text(models, config, cluster, metric))
    return EXIT_DONE


# ---- what there is ----


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
            # Whoever has the files was granted them.
            yield Model(f"model.path={path}", path, "cache", True, licence=_licence(snapshot))


def _folders(paths: Sequence[str]) -> Iterator[Model]:
    for path in paths:
        if not (Path(path) / "config.json").is_file():
            reason = "there is no config.json in it" if Path(path).is_dir() else "there is no such folder"
            raise UserError(Problem("FOLDER", reason, "give a folder in Hugging Face layout", path))
        yield Model(f"model.path={path}", path, "folder", True, licence=_licence(Path(path)), gated=False)


def _on_hub(words: str) -> list[Model]:
    """Return the models that a search of the hub finds. Raises UserError where the hub cannot be asked."""
    if hub.is_offline():
        raise UserError(Problem("--hub", "HF_HUB_OFFLINE is set", "leave --hub out, or unset it", words))
    from huggingface_hub import HfApi, hf_hub_download

    try:
        listed = list(HfApi().list_models(search=words, sort="downloads", limit=HUB_MODELS, full=True, cardData=True))
    except Exception as error:  # classes differ among the releases of huggingface_hub and its HTTP libraries
        if not hub.is_connection_problem(error):
            raise
        reason = f"the hub cannot be reached ({type(error).__name__})"
        raise UserError(Problem("--hub", reason, "leave --hub out, or see to the connection", words)) from error
    models = []
    for info in listed:
        card = info.card_data.to_dict() if info.card_data else {}
        model = Model(f"model.path={info.id}", info.id, "hub", _snapshot(info.id) is not None)
        model.licence, model.gated = str(card.get("license") or ""), bool(info.gated)
        try:
            hf_hub_download(info.id, "config.json")  # a few kB, for the planner
        except Exception as error:  # as above
            model.note = f"its config.json cannot be had ({type(error).__name__})"
        models.append(model)
    return models


def _snapshot(path: str) -> Path | None:
    """Return the folder of a hub model in the cache with weights in it."""
    folder = source.cached_snapshot(ModelConfig(path=path))
    return folder if folder is not None and any(folder.glob("*.safetensors")) else None


def _licence(folder: Path | None) -> str:
    """Return what the model card's front matter says."""
    try:
        text = (folder / "README.md").read_text(encoding="utf-8") if folder else ""
    except (OSError, UnicodeDecodeError):
        return ""
    header = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
    licence = re.search(r"^license:\s*(\S+)", header[1], re.MULTILINE) if header else None
    return licence[1] if licence else ""


# ---- what they take ----


def _count_at_once(models: Sequence[Model], config: RunConfig) -> None:
    """Have the planner count all models without a closed form in one child, which takes seconds to start."""
    unknown = []
    for model in models:
        with suppress(UserError):
            where = replace(config.model, path=model.path, revision=None, chat_template=None)
            whole = source.whole_config_json(where)
            if not is_known(source.config_json(where)) and not size_problems(whole):
                unknown.append(whole)
    with suppress(UserError):
        counted.count(unknown, head_of(config), labels_of(config))


def _described(model: Model, config: RunConfig, cluster: Cluster) -> bool:
    """Fill in what `config.json` and the planner say; False where the task cannot start from such a model."""
    # One row at a time: whether a model fits at all, not how fast it is then.
    model_config = replace(
        config,
        model=replace(config.model, path=model.path, revision=None, chat_template=None),
        trainer=replace(config.trainer, micro_batch_size=1, global_batch_size=1),
    )
    try:
        values = source.config_json(model_config.model)
    except UserError as error:
        model.note = model.note or error.problems[0].reason
        return model.origin != "cache"  # what else lies in a cache: adapters, data of other tools
    kind = str(values.get("model_type"))
    whole = source.whole_config_json(model_config.model)
    if not model.modality and whole.get("vision_config"):
        model.modality = "text, images" if whole.get("model_type") in FAMILIES else "text, images (trained on text)"
    published = PUBLISHED.get(model.path)
    if not _suits(kind, config.task) or (published and published.use != "chat" and task_of(config.task).generates):
        return False
    lengths = (values.get(key) for key in ("max_position_embeddings", "n_positions"))
    model.context = next((length for length in lengths if type(length) is int and length > 0), None)
    if model.context is None and published is not None:
        model.context = published.context
    try:
        estimate = planner.planned(model_config, cluster)
    except DstuneError as error:
        model.note = f"no plan: {getattr(error, 'problems', [error])[0]}".splitlines()[0]
        return True
    model.parameters = estimate.setup.model.parameters
    fitting = [choice for choice in estimate.plan.choices if choice.fits]
    least = min(
        fitting,
        key=lambda choice: (choice.offload != "none", choice.setup.stage, effort(choice.checkpointing)),
        default=None,
    )
    if least is None:
        model.zero = "none fits"
        return True
    model.zero = least.zero.replace("stage", "ZeRO-")
    if least.offload != "none":
        model.zero += f" + offload of {least.offload.replace('+', ' and ')}"
    if effort(least.checkpointing) > effort(config.trainer.activation_checkpointing):
        model.zero += f", activations {'selectively ' * isinstance(least.checkpointing, Selective)}checkpointed"
    return True


def _suits(kind: str, task: TaskConfig) -> bool:
    if kind in ENCODER_DECODERS:
        return task_of(task).encoder_decoder
    if kind in ENCODERS:
        return not task_of(task).generates
    return True


# ---- how good they are ----


def _probe(models: list[Model], config: RunConfig, overrides: list[str], data: str, rows: int) -> str:
    """Score the models that are here and sort all by it, the best first. Returns the metric. Raises UserError where the
    task has nothing to be asked for, or none could be asked."""
    ranked_by = task_of(config.task).ranked_by
    if not ranked_by:
        reason = f"an untuned model has no answers to task={config.task.name}"
        *others, last = (name for name, cls in TASKS.classes().items() if cls.ranked_by)
        raise UserError(Problem("--probe", reason, f"task={', '.join(others)} or {last}", data))
    measured: dict[str, dict[str, float]] = {}
    for model in models:
        if not model.here:
            model.note = model.note or "not asked: its weights are not here"
            continue
        print(f"asking {model.path}", file=sys.stderr, flush=True)
        try:
            measured[model.path] = _measure_untuned(model, config, overrides, data, rows)
        except UserError as error:
            model.note = f"not asked: {error.problems[0].reason}"
    if not measured:
        reasons = "; ".join(f"{model.path}: {model.note}" for model in models if model.here)
        reason = f"no model could be asked ({reasons})" if reasons else "no model of the task is on this machine"
        raise UserError(Problem("--probe", reason, "dstune samples smollm2, or a FOLDER", data))
    metric, less = next(
        (name, less) for name, less in ranked_by if all(name in metrics for metrics in measured.values())
    )
    for model in models:
        model.score = measured.get(model.path, {}).get(metric)
    models.sort(key=lambda model: (model.score is None, (model.score or 0.0) * (1 if less else -1)))
    return metric


def _measure_untuned(model: Model, config: RunConfig, overrides: list[str], data: str, rows: int) -> dict[str, float]:
    """Return the metrics of the untuned model, as `dstune evaluate MODEL --shots 0` has them (an embedding needs no prompt).
    Raises UserError where it cannot be asked, DstuneError where a signal has stopped it."""
    words = [*overrides, f"data.validation={quoted(data)}", f"evaluate.max_rows={rows}", "data.packing=false"]
    if not config.data.train:
        words.append("data.clean.leaks=false")
    shots = ["--shots", "0"] if task_of(config.task).few_shot else []
    printed = io.StringIO()
    with redirect_stdout(printed):
        code = evaluate.ask([model.path, *words, *shots, "--json"])
    if code == EXIT_PREEMPTED:  # whoever stops the verb does not mean this model alone
        raise DstuneError(f"stopped while {model.path} was asked")
    if code != EXIT_DONE:
        raise UserError(Problem("--probe", f"dstune evaluate ended with exit code {code}", "see above", model.path))
    result: dict[str, Any] = json.loads(printed.getvalue().splitlines()[-1])
    metrics: dict[str, float] = result["prompted"][0]["metrics"] if "prompted" in result else result["metrics"]
    return metrics


def _text(models: list[Model], config: RunConfig, cluster: Cluster, metric: str) -> str:
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
        cells += [model.licence, gated, str(model.year or ""), model.modality, model.zero or model.note]
        if metric:
            cells.append(model.note if model.score is None else f"{model.score:.4f}")
        lines.append(cells)
    widths = [max(len(line[column]) for line in lines) for column in range(len(columns))]
    right = {2, 3}
    rows = []
    for line in lines:
        padded = [cell.rjust(widths[at]) if at in right else cell.ljust(widths[at]) for at, cell in enumerate(line)]
        rows.append("  ".join(padded).rstrip())
    advice = "" if os.environ.get("HF_HUB_OFFLINE") else "; --hub WORDS asks the hub"
    return "\n".join([head, *rows, f"{len(models)} models{advice}"])
