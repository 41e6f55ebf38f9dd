"""Fetches everything that a run needs from outside, or refuses the run, once, before any rank starts.

Ranks never contact a hub: packaged samples are brought into the cache, and a hub id becomes a commit whose files are in
the hub's cache. Any failure exits with 2 and says what to do.
"""

from __future__ import annotations

import difflib
import importlib.util
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from dstune import samples
from dstune.chat_templates import NAMES, template_path
from dstune.config import registered
from dstune.config.architectures import (
    encoder_decoder_problem,
    encoder_problem,
    is_encoder,
    noisy_encoder_decoder_problem,
    packed_encoder_decoder_problem,
    size_problems,
)
from dstune.config.convert import format_value
from dstune.config.data_schema import DataConfig
from dstune.config.forgetting import with_replay
from dstune.config.multi_task import tasks_of
from dstune.config.requirements import requirement_problem
from dstune.config.rope import rope_problems
from dstune.config.schema import InitialWeights, ModelConfig, Precision, RunConfig, stage_of
from dstune.config.stored_formats import describe_stored_format, read_description, stored_format_problem
from dstune.config.validate import at_stage
from dstune.core.errors import Problem, UserError, collected
from dstune.core.model_names import HUB_ID, refuse_ambiguous_folder
from dstune.core.parsing import read_object
from dstune.core.weight_index import INDEX, check_indexes
from dstune.data import inputs, sources
from dstune.data.clean import extras as cleaning
from dstune.data.hub import hub_name
from dstune.launch import hub, hub_data, table_rows
from dstune.launch.commands import count_gpus
from dstune.launch.first_rows import first_row_problems, hardware_problems, task_problems
from dstune.launch.held_out import with_share
from dstune.launch.positions import within_positions
from dstune.launch.room import memory_problems
from dstune.launch.stages import choose
from dstune.planning.source import config_json, whole_config_json
from dstune.planning.stage import is_open
from dstune.protocols import TRACKERS, method_of, optimizer_of, parallelism_of, task_of
from dstune.protocols.method_options import HasRequirements, StartsFromAdapters
from dstune.protocols.task import TaskConfig
from dstune.protocols.task_options import NeedsReference

Stage = Callable[[str], None]

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
)


def resolve_run(
    config: RunConfig, stage: Stage = lambda text: None, *, trains: bool = True, origins: dict[str, str] | None = None
) -> RunConfig:
    """Return `config` with everything in place that it names: samples fetched, a hub revision resolved to a commit and downloaded;
    model folder, the first rows of the data files and the hardware checked; a ZeRO stage in place of `auto`.

    stage: called with a text before work that may take long. trains: whether there must be memory for training. origins: receives
    the origins of values that are chosen here, by key.

    Raises:
        UserError: everything that is missing or unavailable, listed together.
    """
    config = with_replay(config)
    problems: list[Problem] = []
    model, fetched = config.model, False
    with collected(problems):
        model = resolve_model(config.model, stage, config)
    with collected(problems):
        config = replace(config, task=resolve_further_models(config, stage))
    with collected(problems):
        config = replace(config, data=hub_data.resolve(config.data, stage))
        fetched = True
    config, refused = table_rows.resolve(config, stage)
    problems += refused
    for key, part, source_config in inputs.row_inputs(config):
        spec = getattr(source_config.data, part)
        if (not fetched and hub_name(spec)) or (refused and sources.data_source_of(spec)):
            continue  # it is among the problems
        with collected(problems):
            check_data(key, part, source_config, stage)
            row_problems = first_row_problems(source_config, part, key, trains=trains)
            problems += [problem for problem in row_problems if problem not in problems]
    with collected(problems):
        config = _with_resolved_adapters(config)
    problems += _missing(config)
    problems += augment_problems(config, stage) if trains else []
    _refuse(problems)
    config = replace(config, model=model)
    config = within_positions(config, stage)
    config, held_out = with_share(config)
    if held_out and trains:
        stage(f"{held_out} for validation")
    if held_out and origins is not None:
        origins["data.split.validation"] = held_out
    if is_open(config) and trains:
        config, why = choose(config)
        stage(f"zero.stage={format_value(config.zero.stage)}: {why}")
        if origins is not None and not is_open(config):
            origins["zero.stage"] = why
    elif not trains:
        config = at_stage(config, stage_of(config.zero))
    if trains:
        _refuse(memory_problems(config))
    return config


def _with_resolved_adapters(config: RunConfig) -> RunConfig:
    method = method_of(config.method)
    return replace(config, method=method.resolve()) if isinstance(method, StartsFromAdapters) else config


def _missing(config: RunConfig) -> Iterator[Problem]:
    """Yield the requirements of method, template, trackers, tasks and cleaning that this machine lacks."""
    method = method_of(config.method)
    needs_gpu = config.trainer.precision is Precision.fp16
    if isinstance(method, HasRequirements):
        yield from method.missing()
        needs_gpu |= any(True for _ in method.check_cpu(config))
    yield from optimizer_of(config.optimizer).missing()
    if needs_gpu:  # looking for GPUs starts a program
        yield from hardware_problems(config, count_gpus(os.environ))
    template = config.model.chat_template
    if template is not None and not template_path(template).is_file():
        fix = f"give a Jinja file, or one of {', '.join(NAMES)}"
        yield Problem("model.chat_template", "there is no such file", fix, template)
    for tracker in TRACKERS.classes().values():
        if tracker.enabled(config.tracking):
            yield from tracker.missing(config.tracking)
    yield from task_problems(config)
    yield from cleaning.missing(config.data.clean)
    if canaries := config.evaluate.canaries:
        try:
            sources.expand(canaries, "evaluate.canaries", split="train")
        except UserError as error:
            yield from error.problems


def check_data(key: str, part: str, config: RunConfig, stage: Stage) -> None:
    """Fetch a sample; check that the files of `data.PART` are there.

    key: what problems name as their source.

    Raises:
        UserError: no such sample or file.
    """
    spec = getattr(config.data, part)
    if samples.is_sample(spec):
        fetch_sample(key, samples.without_slice(spec)[0], "data", stage)
    try:
        sources.of_part(config.data, part, key)
    except UserError as error:
        if (similar := _similar(Path(spec))) and not Path(spec).exists():
            raise UserError(replace(error.problems[0], fix=f"did you mean {similar}?")) from None
        raise


def resolve_rows(data: DataConfig, part: str, stage: Stage) -> DataConfig:
    """Return `data` with the files of one part in place: a sample fetched, a data set of the hub at a commit and downloaded.

    Raises:
        UserError: no such sample, file or data set.
    """
    spec = getattr(data, part)
    if samples.is_sample(spec):
        fetch_sample(f"data.{part}", samples.without_slice(spec)[0], "data", stage)
        return data
    if (source := sources.data_source_of(spec)) is not None:
        pinned: dict[str, Any] = {part: source.resolve(spec, f"data.{part}", stage)}
        data = replace(data, **pinned)
    return hub_data.resolve(data, stage) if hub_name(spec) else replace(data, subset=None, revision=None)


def resolve_model(config: ModelConfig, stage: Stage, run: RunConfig | None = None) -> ModelConfig:
    """Return the model with its `revision` resolved to a commit if it comes from the hub.

    run: the run that trains it, if any; models that its task cannot train are refused.

    Raises:
        UserError: no such sample, folder or hub id; files that dstune does not load; remote code without permission.
    """
    if registered.registry_of(config.path) is not None:
        if config.revision is not None:
            fix = "leave model.revision out: the address names the version"
            raise UserError(Problem("model.revision", "a registered model has no revisions", fix, config.revision))
        pinned = registered.pin(config.path, "model.path")
        if pinned != config.path:
            stage(f"model {config.path}: {pinned}")
        folder = registered.fetch(pinned, "model.path", stage)
        refuse_ambiguous_folder(str(folder), "model.path", trusts_code=config.trust_remote_code)
        check_folder(folder, config, run)
        return replace(config, path=pinned)
    if samples.is_sample(config.path):
        fetch_sample("model.path", config.path, "model", stage)
        if run is not None and parallelism_of(run.parallel).weight_ranks > 1:  # its description is in the package
            _refuse(sharing_problems(config_json(config), run))
        if run is not None:
            _refuse(encoder_problems(whole_config_json(config) | config.config_overrides, config, run))
        if config.revision is not None:
            fix = "leave model.revision out"
            raise UserError(Problem("model.revision", "a packaged sample has no revisions", fix, config.revision))
        return config
    folder = Path(config.path)
    refuse_ambiguous_folder(config.path, "model.path", trusts_code=config.trust_remote_code)
    if folder.is_dir():
        if HUB_ID.fullmatch(config.path):
            stage(f"model {config.path}: the folder ./{config.path}, not the hub's model of that name")
        if config.revision is not None:
            reason = "model.path is a local folder, which has no revisions"
            raise UserError(Problem("model.revision", reason, "leave model.revision out", config.revision))
        check_folder(folder, config, run)
        _tell_stored_format(folder, config, stage)
        return config
    if looks_local(config.path):
        raise UserError(_no_folder(config.path))
    try:
        commit, snapshot = hub.fetch(config, stage, lambda folder: _refuse(description_problems(folder, config, run)))
    except UserError as error:
        if similar := _similar(folder):
            problems = [replace(problem, fix=f"{problem.fix}; or is {similar} meant?") for problem in error.problems]
            raise UserError(problems) from error
        raise
    check_folder(snapshot, config, run)
    _tell_stored_format(snapshot, config, stage)
    return replace(config, revision=commit)


def _tell_stored_format(folder: Path, config: ModelConfig, stage: Stage) -> None:
    if description := describe_stored_format(read_description(folder) or {}):
        stage(f"model {config.path}: {description}")


def resolve_further_models(config: RunConfig, stage: Stage) -> TaskConfig:
    """Return the task with its further models (a reference) in place, and their revisions resolved to commits.

    Raises:
        UserError: as `resolve_model`, about the keys of the task.
    """
    task: Any = config.task
    room = task_of(task)
    for further in room.further_models if isinstance(room, NeedsReference) else ():
        if getattr(task, further.path) is None:
            continue
        model = replace(config.model, path=getattr(task, further.path), revision=getattr(task, further.revision))
        keys = {"model.path": f"task.{further.path}", "model.revision": f"task.{further.revision}"}
        try:
            local_model = resolve_model(replace(model, weights=InitialWeights.pretrained), stage)
        except UserError as error:
            renamed = [replace(problem, where=keys.get(problem.where, problem.where)) for problem in error.problems]
            raise UserError(renamed) from None
        task = replace(task, **{further.revision: local_model.revision})
    resolved: TaskConfig = task
    return resolved


def augment_problems(config: RunConfig, stage: Stage) -> list[Problem]:
    """Fetch the models and the table of `data.augment`; return a problem for each that is missing."""
    augment, problems = config.data.augment, []
    if not augment.on:
        return []
    for path in augment.models:
        try:
            resolve_model(ModelConfig(path=path), stage)
        except UserError as error:
            problems += [replace(problem, where="data.augment.models") for problem in error.problems]
    if augment.synonyms:
        with collected(problems):
            sources.expand(augment.synonyms, "data.augment.synonyms")
    return problems


def looks_local(path: str) -> bool:
    """Return whether `path` cannot be a hub id (`NAME` or `OWNER/NAME`)."""
    if not HUB_ID.fullmatch(path) or Path(path).exists():
        return True
    folder = Path(path).parent  # `runs/mistyped` has the form of a hub id, and runs beside it tell
    return folder != Path() and next(folder.glob("*/run.yaml"), next(folder.glob("*/*/run.yaml"), None)) is not None


def fetch_sample(key: str, uri: str, kind: str, stage: Stage) -> None:
    """Bring a packaged sample into the cache.

    Raises:
        UserError: there is no such sample, it is not of this `kind` (`model` or `data`), or it cannot be fetched.
    """
    info = next((info for info in samples.available() if info.uri == samples.without_split(uri)), None)
    if info is not None and info.kind != kind:
        fitting = ", ".join(info.uri for info in samples.available() if info.kind == kind)
        raise UserError(Problem(key, f"this sample is no {kind}", f"the {kind} samples are {fitting}", uri))
    if info is not None and info.path is None:
        stage(f"fetching {uri} ({info.download_bytes / 1e6:.0f} MB)")
    try:
        samples.resolve(uri)
    except UserError as error:
        raise UserError(replace(problem, where=key, value=uri) for problem in error.problems) from None


def check_folder(folder: Path, config: ModelConfig, run: RunConfig | None = None) -> None:
    """Check by its files alone that dstune can load the model in `folder`, and train it as in `run`.

    Raises:
        UserError: everything that is missing.
    """
    problems = description_problems(folder, config, run)
    if (folder / "config.json").is_file() and config.weights is InitialWeights.pretrained:
        problems += _weight_problems(folder, config)
    _refuse(problems)


def description_problems(folder: Path, config: ModelConfig, run: RunConfig | None = None) -> list[Problem]:
    """Return what is wrong with the files that describe the model (the weights may not be there yet), for `run` if it is given."""
    architecture = read_description(folder)
    if architecture is None:
        return [_no_config(folder, config)]
    problems = size_problems(architecture | config.config_overrides, value=config.path)
    requirement = requirement_problem(architecture, config.path)
    problems += [] if requirement is None else [requirement]
    kind = str(architecture.get("model_type"))
    problems += encoder_problems(architecture | config.config_overrides, config, run)
    if run is not None and architecture.get("is_encoder_decoder") and requirement is None:
        if not all(task_of(task).encoder_decoder for task in (run.task, *tasks_of(run).values())):
            problems.append(encoder_decoder_problem(config, kind))
        elif run.data.packing:
            problems.append(packed_encoder_decoder_problem(kind))
        if config.neftune_alpha:
            problems.append(noisy_encoder_decoder_problem(kind, config.neftune_alpha))
        refused = method_of(run.method).encoder_decoder_problem(kind)
        problems += [] if refused is None else [refused]
    decoder = architecture.get("text_config")  # of a model that reads images too
    layers = architecture | (decoder if isinstance(decoder, dict) else {}) | config.config_overrides
    problems += sharing_problems(layers, run)
    problems += rope_problems(layers, config.rope, run.data.max_length if run is not None else 0)
    if run is not None and config.weights is InitialWeights.pretrained:
        stored = stored_format_problem(architecture, config.path, method_of(run.method))
        problems += [] if stored is None else [stored]
    if needs_remote_code(architecture) and not config.trust_remote_code:
        reason = f"{config.path} is defined by Python code of its own, which runs only with your permission"
        fix = "model.trust_remote_code=true, if you have read the code and trust its author"
        problems.append(Problem("model.trust_remote_code", reason, fix, "false"))
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        fix = "save the tokenizer there with tokenizer.save_pretrained(folder)"
        problems.append(Problem("model.path", "there are no tokenizer files in it", fix, config.path))
    return problems


def encoder_problems(architecture: dict[str, Any], config: ModelConfig, run: RunConfig | None) -> list[Problem]:
    """Return the problem if the model is an encoder and a task of `run` writes text. architecture: its `config.json`."""
    writes = run is not None and any(task_of(task).generates for task in (run.task, *tasks_of(run).values()))
    if not writes or not is_encoder(architecture):
        return []
    kind = architecture.get("model_type")
    return [encoder_problem(config, f"{kind} is an encoder, whose positions read the tokens after them")]


def sharing_problems(architecture: dict[str, Any], run: RunConfig | None) -> list[Problem]:
    """Return why ranks cannot share the weights of a model, where `run` wants them to."""
    return [] if run is None else parallelism_of(run.parallel).weights_problems(architecture)


def _refuse(problems: list[Problem]) -> None:
    if problems:
        raise UserError(problems)


def needs_remote_code(architecture: dict[str, Any]) -> bool:
    """Return whether transformers has no code for this architecture (many models also bring theirs)."""
    if not architecture.get("auto_map"):
        return False
    installed = importlib.util.find_spec("transformers")
    if installed is None or installed.origin is None:
        return True
    name = str(architecture.get("model_type", "")).replace("-", "_")
    return not name or not (Path(installed.origin).parent / "models" / name).is_dir()


def _weight_problems(folder: Path, config: ModelConfig) -> list[Problem]:
    try:
        check_indexes(folder, "model.path", config.path)
    except UserError as error:
        return error.problems
    index = read_object(folder / INDEX)
    if index is not None and isinstance(index.get("weight_map"), dict):
        missing = sorted({name for name in index["weight_map"].values() if not (folder / name).is_file()})
        if missing:
            reason = f"{len(missing)} weight file(s) of its index are missing, first {missing[0]}"
            return [Problem("model.path", reason, "complete the download or copy", config.path)]
        return []
    if any(folder.glob("*.safetensors")):
        return []
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt")):
        reason = "only pickled weights (.bin) are there, which may run code when they are loaded"
        fix = (
            f"convert them once where you trust them: {_auto_class(folder)}.from_pretrained(PATH).save_pretrained(NEW), "
            "and the same with AutoTokenizer"
        )
    elif any(folder.glob("*.gguf")):
        reason = "only GGUF weights are there"
        fix = "convert them once: from_pretrained(PATH, gguf_file=NAME), then save_pretrained(NEW)"
    else:
        reason = "there are no weights (*.safetensors) in it"
        fix = "give a folder with weights, or model.weights=random to train from new ones"
    return [Problem("model.path", reason, fix, config.path)]


_HEADS = ("SequenceClassification", "TokenClassification", "QuestionAnswering", "MaskedLM", "CausalLM")
_AUTO_CLASSES = {f"For{head}": f"AutoModelFor{head}" for head in _HEADS} | {
    "LMHeadModel": "AutoModelForCausalLM",
    "ForConditionalGeneration": "AutoModelForSeq2SeqLM",
}
"""By the end of an architecture's name."""


def _auto_class(folder: Path) -> str:
    """Return the class of transformers that loads a model with its head."""
    architectures = (read_object(folder / "config.json") or {}).get("architectures") or [""]
    return next((auto for end, auto in _AUTO_CLASSES.items() if str(architectures[0]).endswith(end)), "AutoModel")


def _no_config(folder: Path, config: ModelConfig) -> Problem:
    if (folder / "adapter_config.json").is_file():
        fix = "merge it first (dstune export RUN --merge), or name its base model"
        return Problem("model.path", "this is an adapter, not a model", fix, config.path)
    if (folder / "run.yaml").is_file():
        fix = f"model.path={folder / 'export'}, or run.resume={folder} to go on with the run"
        return Problem("model.path", "this is a run directory, not a model", fix, config.path)
    nested = sorted(path.parent for path in folder.glob("*/config.json"))
    fix = f"model.path={nested[0]}" if nested else "give a folder in Hugging Face layout, a hub id or a sample://"
    return Problem("model.path", "there is no readable config.json in this folder", fix, config.path)


def _no_folder(path: str) -> Problem:
    place = Path(path)
    if place.is_file():
        fix = f"model.path={place.parent}, if it is in Hugging Face layout"
        return Problem("model.path", "this is a file; a model is a folder", fix, path)
    if path.startswith("~"):
        fix = f"write the path out: {place.expanduser()}"
    elif similar := _similar(place):
        fix = f"did you mean {similar}?"
    else:
        fix = "give a folder that exists, a hub id (OWNER/NAME) or a sample:// name"
    return Problem("model.path", "this folder does not exist", fix, path)


def _similar(path: Path) -> Path | None:
    """Return the path next to the missing `path` with the most similar name."""
    try:
        names = os.listdir(path.parent)
    except OSError:
        return None
    matches = difflib.get_close_matches(path.name, names, n=1, cutoff=0.75)
    return path.with_name(matches[0]) if matches else None
