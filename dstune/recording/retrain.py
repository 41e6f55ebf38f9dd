"""The verb `retrain`: from a recorded job to a configuration of `dstune train`, or to a job of another fine-tuning API."""

from __future__ import annotations

import argparse
import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dstune.config.by_method import rate_of
from dstune.config.compose import compose
from dstune.config.validate import validate
from dstune.core import files
from dstune.core.api_client import ApiClient
from dstune.core.arguments import VerbParser
from dstune.core.errors import EXIT_DONE, Problem, UserError
from dstune.core.text import one_line
from dstune.launch import starter
from dstune.launch.starter import Line, Starter
from dstune.planning import hardware
from dstune.planning.hardware import Cluster
from dstune.recording import options
from dstune.recording.folder import MANIFEST, file_name, read_object

DESCRIPTION = """\
Train an open model as a recorded job trained the hosted one. Writes a configuration for `dstune train`, with a line for every
hyperparameter of the job; the base model is the largest of dstune's list that fits on this machine or --hardware. With --server,
uploads the job's files to a server with OpenAI's fine-tuning API, such as `dstune serve --fine-tuning`, and creates the job there.
"""
TASKS = {"supervised": "chat", "dpo": "preference", "reinforcement": "reinforcement"}
"""By the method of a job."""
SAMPLES = 8
"""Answers to a prompt at the compute multiplier 1."""
AUTO = "auto"
HELD_OUT = "supervised", "dpo"


@dataclass(frozen=True)
class RecordedJob:
    """A fine-tuning job of a recording."""

    id: str
    base: str
    """The hosted model that it trained."""
    model: str
    """The name of the model that it made."""
    method: str
    hyperparameters: Mapping[str, Any]
    seed: Any
    suffix: str
    grader: Mapping[str, Any] | None
    training: Path
    validation: Path | None
    file_names: Mapping[Path, str]
    """The names under which the files were uploaded."""
    notes: list[str] = field(default_factory=list)
    """What of the job cannot be repeated."""


def main(argv: list[str]) -> int:
    """Run the verb and return the exit code. Raises UserError, ServerUnreachable."""
    arguments = _make_parser().parse_intermixed_args(argv)
    _check(arguments)
    job = read_job(arguments.recording, arguments.job)
    print(f"job {one_line(job.id)} trained {one_line(job.base)}, method {job.method}, to {one_line(job.model)}")
    if arguments.server is not None:
        _submit(ApiClient(options.address_of(arguments)), job, arguments.model)
    else:
        _write(arguments, job)
    return EXIT_DONE


def _make_parser() -> VerbParser:
    parser = VerbParser("dstune retrain", description=DESCRIPTION, allow_abbrev=False)
    parser.add_argument("recording", type=Path, metavar="RECORDING", help="folder of `dstune record`")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="settings that you have decided already")
    parser.add_argument("--job", metavar="ID", help="a job, or the model that it made [the only one that succeeded]")
    parser.add_argument("--output", type=Path, default=Path("retrain.yaml"), metavar="FILE", help="[retrain.yaml]")
    parser.add_argument("--force", action="store_true", help="overwrite the file if it exists")
    parser.add_argument("--hardware", metavar="NxNAME", help="where it will be trained, as in `dstune plan` [here]")
    server = parser.add_argument_group("a job on a server")
    server.add_argument("--server", metavar="URL", help="of a fine-tuning API, up to /v1")
    server.add_argument("--model", metavar="NAME", help="the model there that the job trains")
    options.add_connection(server)
    return parser


def _check(arguments: argparse.Namespace) -> None:
    """Raises UserError with every invalid flag."""
    problems = options.connection_problems(arguments)
    if (arguments.server is None) != (arguments.model is None):
        flags = "--server URL --model NAME"
        problems.append(Problem("--server", "a job on a server names the model there", flags))
    if arguments.server is not None and (arguments.overrides or arguments.hardware):
        reason = "the server decides the settings of its jobs"
        problems.append(Problem("--server", reason, "leave out key=value and --hardware"))
    if problems:
        raise UserError(problems)
    if arguments.server is None:
        starter.check_output(arguments.output, arguments.force)


# -- the recorded job


def read_job(recording: Path, name: str | None) -> RecordedJob:
    """Return the job `name` (its id, or the model that it made), or the only one that succeeded. Raises UserError."""
    read_object(recording / MANIFEST, recording)
    jobs = []
    for path in sorted((recording / "jobs").glob("*.json")):
        content = read_object(path, recording).get("job")
        if isinstance(content, dict):
            jobs.append(content)
    succeeded = [job for job in jobs if job.get("fine_tuned_model")]
    chosen = [job for job in jobs if name in (job.get("id"), job.get("fine_tuned_model"))] if name else succeeded
    if len(chosen) != 1:
        reason = f"there is no job {name}" if name else "which job?" if chosen else "no job of it made a model"
        known = ", ".join(
            f"{one_line(str(job.get('id')))} ({one_line(str(job['fine_tuned_model']))})" for job in succeeded
        )
        raise UserError(
            Problem("--job", reason, f"--job ID, one of: {known}" if known else "another recording", str(recording))
        )
    (job,) = chosen
    method: dict[str, Any] = job["method"] if isinstance(job.get("method"), dict) else {}
    kind = str(method.get("type") or "supervised")
    if kind not in TASKS:
        fix = f"a job with one of: {', '.join(TASKS)}"
        raise UserError(Problem("--job", "dstune does not have its method", fix, one_line(kind)))
    settings: dict[str, Any] = method[kind] if isinstance(method.get(kind), dict) else {}
    values = settings.get("hyperparameters") or job.get("hyperparameters")
    names: dict[Path, str] = {}
    training = _content(recording, job.get("training_file"), "training", names)
    validation = (
        _content(recording, job["validation_file"], "validation", names) if job.get("validation_file") else None
    )
    notes = [f"{part} is left out" for part in ("integrations", "metadata") if job.get(part)]
    grader = settings.get("grader") if kind == "reinforcement" else None
    return RecordedJob(
        str(job.get("id")), str(job.get("model")), str(job.get("fine_tuned_model")), kind,
        dict(values) if isinstance(values, dict) else {}, job.get("seed"), str(job.get("user_provided_suffix") or ""),
        grader if isinstance(grader, dict) else None, training, validation, names, notes,
    )  # fmt: skip


def _content(recording: Path, identifier: Any, part: str, names: dict[Path, str]) -> Path:
    """Return the path of a recorded file, and note its name in `names`. Raises UserError if it was not recorded."""
    record_path = recording / "files" / f"{file_name(str(identifier))}.json"
    if not record_path.is_file():
        reason = f"its {part} file is not in the recording; manifest.json says why under `missing`"
        raise UserError(Problem("--job", reason, "another job", str(identifier)))
    record = read_object(record_path, recording)
    path = record_path.with_name(Path(str(record.get("content"))).name)
    if path.is_symlink() or not path.is_file():  # the recording may be a stranger's: a link may lead to any file
        raise UserError(Problem("RECORDING", f"{path.name} is gone", "record it again", str(recording)))
    described = record.get("file")
    names[path] = str((described.get("filename") if isinstance(described, dict) else None) or path.name)
    return path


# -- a configuration of `dstune train`


def _write(arguments: argparse.Namespace, job: RecordedJob) -> None:
    """Write the configuration, and print what became of every setting of the job."""
    cluster = None if arguments.hardware is None else hardware.parse(arguments.hardware, {}, 1, "--hardware")
    rows = starter.read_rows(str(job.training))
    grader_file = arguments.output.with_suffix(".grader.json") if job.grader is not None else None
    if grader_file is not None:
        files.write(grader_file, json.dumps(job.grader, indent=2) + "\n", mode=0o600)
    lines, notes = translate(job, grader_file)
    settings, _, cluster = starter.starter_for(str(job.training), rows, arguments.overrides, lines, cluster)
    add_rate(settings, job)
    settings.add("run.dir", f"runs/{settings.value('run.name')}", "the same command continues the run")
    config = compose(settings.overrides()).config
    validate(config)
    starter.write(arguments.output, starter.render(settings, ["dstune", "retrain", str(arguments.recording)], cluster))
    translated = {line.key for line in lines} | {"optimizer.lr", "model", "model.path", "method"}
    for line in settings.lines:
        if line.key in translated and line.comment:
            print(f"  {line.key}: {one_line(str(line.value))}  # {one_line(line.comment)}")
    for note in [*job.notes, *notes]:
        print(f"  {one_line(note)}")
    _print_bases(settings, cluster)
    print(starter.summary(settings, rows, config, arguments.output))
    word = shlex.quote(f"{job.model}={settings.value('run.dir')}")
    print(f"  dstune serve {word}   # answers under the old name")


def translate(job: RecordedJob, grader_file: Path | None = None) -> tuple[list[Line], list[str]]:
    """Return the settings that a job's hyperparameters become, each with its reason, and what is not translated.

    The learning rate is not among them: `add_rate` computes it once the method is known.
    """
    values = dict(job.hyperparameters)
    values.pop("learning_rate_multiplier", None)
    lines = [Line("task", TASKS[job.method], f"the job's method: {job.method}")]
    notes: list[str] = []

    def take(name: str, key: str, comment: str, read: Any = int) -> None:
        value = values.pop(name, None)
        if value in (None, AUTO):
            notes.append(f"{name}: {AUTO} in the job; dstune chooses {key}")
        elif isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e9:
            notes.append(f"{name}: {str(value)[:40]} is no number of this hyperparameter; dstune chooses {key}")
        else:
            lines.append(Line(key, read(value), comment))

    take("n_epochs", "trainer.epochs", "the job's n_epochs")
    take("batch_size", "trainer.global_batch_size", "the job's batch_size")
    if job.method == "dpo":
        lines.append(Line("task.loss", "dpo", "the job's method"))
        take("beta", "task.beta", "the job's beta", float)
    if job.method == "reinforcement":
        if grader_file is None:
            raise UserError(Problem("--job", "the recorded job has no grader", "another job", job.id))
        lines.append(Line("task.graders", [str(grader_file)], "the job's grader"))
        multiplier = f"{SAMPLES} answers to a prompt times the job's compute_multiplier"
        take("compute_multiplier", "task.samples", multiplier, lambda value: max(2, round(SAMPLES * value)))
        if job.validation is not None:
            take("eval_interval", "evaluate.every", "the job's eval_interval, in steps")
            take("eval_samples", "evaluate.max_rows", "the job's eval_samples")
    if isinstance(job.seed, int) and 0 <= job.seed < 2**31:
        lines.append(Line("trainer.seed", job.seed, "the job's seed"))
    if job.method in HELD_OUT:
        lines.append(Line("data.packing", False, "a step has as many rows as the job's batch_size"))
    if job.validation is not None:
        lines.append(Line("data.validation", str(job.validation), "the job's validation file"))
    else:
        lines.append(Line("data.split.validation", 0.0, "the job had no validation file and trained on every row"))
    if name := re.sub(r"[^\w.-]+", "-", job.suffix or job.id).strip("-."):
        lines.append(Line("run.name", name, "the job's suffix" if job.suffix else "the job's id"))
    notes += [
        f"{one_line(str(name))}: {one_line(str(value))[:60]} has no counterpart" for name, value in values.items()
    ]
    return lines, notes


def add_rate(settings: Starter, job: RecordedJob) -> None:
    """Add the learning rate: that of the method, times the job's multiplier."""
    multiplier = job.hyperparameters.get("learning_rate_multiplier")
    if isinstance(multiplier, bool) or not isinstance(multiplier, int | float) or not 0 < multiplier <= 1000:
        return
    config = compose(settings.overrides()).config
    names = {"optimizer": config.optimizer.name, "method": config.method.name, "task": config.task.name}
    rate, origin = rate_of({section: {"name": name} for section, name in names.items()})
    comment = (
        f"{rate:g} ({origin}) times the job's learning_rate_multiplier {multiplier:g}; the hosted rate is not public"
    )
    settings.add("optimizer.lr", float(f"{rate * multiplier:.6g}"), comment)


def _print_bases(settings: Starter, cluster: Cluster) -> None:
    """Print which other base models fit on the hardware."""
    if any(line.key in ("model", "model.path") and line.comment == "yours" for line in settings.lines):
        return
    if not cluster.device.gpu:
        print("  --hardware 1xH100 (or what you will train on) proposes larger base models than a CPU can train")
        return
    open_settings = Starter([line for line in settings.lines if line.key not in ("model", "method", "optimizer.lr")])
    fitting = [f"{model} ({method})" for model, method in starter.fitting_models(open_settings, cluster)]
    print(f"  base models that fit on {cluster.per_node} x {cluster.device.name}: {', '.join(fitting) or 'none'}")


# -- a job on a server


def job_body(job: RecordedJob, model: str, training_file: str, validation_file: str | None) -> dict[str, Any]:
    """Return the body of `POST /fine_tuning/jobs` that repeats the job. The files: ids on that server."""
    hyperparameters = {name: value for name, value in job.hyperparameters.items() if value is not None}
    settings: dict[str, Any] = {"hyperparameters": hyperparameters}
    if job.grader is not None:
        settings["grader"] = job.grader
    body: dict[str, Any] = {
        "model": model,
        "training_file": training_file,
        "method": {"type": job.method, job.method: settings},
        "metadata": {"recorded_job": job.id[:512], "recorded_model": job.model[:512]},
    }
    if validation_file is not None:
        body["validation_file"] = validation_file
    if isinstance(job.seed, int):
        body["seed"] = job.seed
    if job.suffix:
        body["suffix"] = job.suffix
    return body


def _submit(client: ApiClient, job: RecordedJob, model: str) -> None:
    """Upload the files, create the job, and print both. Raises RequestRefused, ServerUnreachable."""
    uploaded: list[str] = []
    for path in [job.training, *([job.validation] if job.validation is not None else [])]:
        entry = client.upload("/files", {"purpose": "fine-tune"}, path, job.file_names[path])
        uploaded.append(str(entry.get("id")))
        print(f"  uploaded {one_line(path.name)}: {one_line(uploaded[-1])}")
    body = job_body(job, model, uploaded[0], uploaded[1] if len(uploaded) > 1 else None)
    for name, value in body["method"][job.method]["hyperparameters"].items():
        print(f"  {one_line(str(name))}: {one_line(str(value))}")
    for note in job.notes:
        print(f"  {one_line(note)}")
    created = client.post("/fine_tuning/jobs", body, once=True)
    print(f"created {one_line(str(created.get('id')))}, which trains {one_line(model)}")
    print(f"  dstune serve ... --fine-tuning --alias {shlex.quote(f'{job.model}=FINE_TUNED_MODEL')}   # the old name")
