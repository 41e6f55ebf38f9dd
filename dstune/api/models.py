"""Trained models from Python: `predict`, `generate`, `evaluate`, `export`; and `plan`, before there is one."""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dstune.core.errors import EXIT_DONE, Problem, TrainingFailed, UserError

if TYPE_CHECKING:
    from dstune.inference.predictor import Predictor
    from dstune.inference.voices import Speaker

Path_ = str | os.PathLike[str]


def predict(
    model: Any, rows: Any, *overrides: str, checkpoint: str | int = "last", **options: Any
) -> list[dict[str, Any]]:
    """Return labels, tags, answers, scores or vectors of rows that have none: one mapping for each row, in order.

    Args:
        model: a `Run`, the directory of a run or checkpoint, an export, a hub id or `sample://NAME`.
        rows: a list of texts or mappings (with the columns of the training rows, without the answers), a `datasets.Dataset` or
            a `pandas.DataFrame`.
        overrides: settings such as `"task.threshold=1"`.
        checkpoint: of a run: a step, `best` or `last`.
        options: `batch_size` (rows computed together, 32), `probabilities` (of every label of a classifier, False).

    Raises:
        UserError: the model or a row is not what its task needs; every such row is listed.
    """
    return Loaded(model).predict(rows, overrides, checkpoint=checkpoint, **options)


def generate(model: Any, prompt: Any, *, checkpoint: str | int = "last", **options: Any) -> Any:
    """Return text from a language model: a string for one prompt, a list of strings for several.

    Args:
        model: a `Run`, the directory of a run or checkpoint, an export, a hub id or `sample://NAME`.
        prompt: a text, a conversation (a list of `{"role": ..., "content": ...}`), or a list of either.
        checkpoint: of a run: a step, `best` or `last`.
        options: `max_new_tokens` (256), `temperature` (0 is greedy), `top_p`, `top_k`, `seed`, `stop` (texts that end an
            answer), `system` (a first message), `plain` (continue the text without the chat template), `batch_size` (8).

    Raises:
        UserError: the model writes no text, or a prompt is longer than it reads.
    """
    return Loaded(model).generate(prompt, checkpoint=checkpoint, **options)


def evaluate(model: Any, *overrides: str, split: str = "validation", checkpoint: str | int = "last") -> dict[str, Any]:
    """Return metrics of a run, an export or a model on held-out rows, on as many ranks as training uses.

    Args:
        model: a `Run`, the directory of a run, an export, a hub id or `sample://NAME`.
        overrides: `"data.test=FILE"` and the like; with a model at least `"data=..."` and `"task=..."`.
        split: `train`, `validation`, `test`, `guard` or `ood`.
        checkpoint: of a run: a step, `best` or `last`.

    Returns:
        `metrics`, `rows`, `split`, and what the task adds (`confusion`, `slices`, ...): as `dstune evaluate --json`.

    Raises:
        UserError: the configuration or the data is wrong.
        TrainingFailed: the ranks did not end well, or were stopped.
    """
    from dstune.api.launching import check_overrides
    from dstune.api.notebook import console
    from dstune.evaluation.command import measure, parse

    path = os.fspath(model)
    check_overrides([path, *overrides])
    arguments = parse([path, *overrides, f"--split={split}", f"--checkpoint={checkpoint}"])
    code, result = measure(arguments, console())
    if code != EXIT_DONE or result is None:
        raise TrainingFailed(f"the evaluation of {path} ended with exit code {code}")
    return result


def export(
    run: Any,
    path: Path_,
    *,
    checkpoint: str | int = "last",
    merge: bool = False,
    force: bool = False,
    reference: bool = True,
) -> Path:
    """Write a run's model as a plain Hugging Face folder: a whole model, or the adapter of an adapter method.

    Args:
        run: a `Run` or the directory of one.
        path: the folder to write, which appears complete or not at all.
        checkpoint: a step, `best` or `last`.
        merge: merge an adapter into its base, so that the folder is a whole model.
        force: replace a former export.
        reference: keep held-out rows beside the weights, against which `dstune serve` proves its answers. Loads the model once
            more, in fp32; where there can be none, a warning says why.

    Returns:
        `path`.

    Raises:
        UserError: no such checkpoint, damaged files, or `path` exists.
    """
    from dstune.checkpoint.copied import folder_for
    from dstune.checkpoint.export import (
        check_free,
        export_checkpoint,
        find_checkpoint,
        refuse_damaged,
        refuse_unmergeable,
        run_directory,
    )
    from dstune.config.run_file import read_run
    from dstune.config.trust import Use
    from dstune.inference.reference import add_reference

    folder = run_directory(Path(os.fspath(run)))
    if merge:
        refuse_unmergeable("merge", read_run(folder / "run.yaml", use=Use.weights).config.method)
    checkpoint_folder = find_checkpoint(folder, str(checkpoint))
    refuse_damaged(folder, checkpoint_folder)
    check_free(Path(path), force)
    with folder_for(Path(path)) as out:
        export_checkpoint(folder, checkpoint_folder, out, merge=merge, force=force)
        if reference and (note := add_reference(out, folder)):
            warnings.warn(f"{note}; `dstune serve` will call it unproven", stacklevel=2)
    return Path(path)


class Plan(dict[str, Any]):
    """What `dstune plan --json` prints; `print(plan)` and a notebook show the table of `dstune plan`."""

    def __init__(self, values: Mapping[str, Any], text: str):
        super().__init__(values)
        self._text = text

    def __str__(self) -> str:
        return self._text

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(self._text)


def plan(
    *overrides: str, hardware: str | None = None, nodes: int | None = None, price: float | None = None, run: Any = None
) -> Plan:
    """Return memory of a rank and time of a step for every ZeRO choice, before anything runs.

    Args:
        overrides: as for `dstune.train`: `"model=llama3_8b"`, `"method=lora"`, ...
        hardware: such as `"8xH100-80G"`; this machine when not given.
        nodes: machines of that kind.
        price: what an hour of one device costs.
        run: plan the configuration of this `Run` or run directory, with `overrides`.

    Returns:
        `choices`, `recommended` (the settings to add), `fits`, `configured`, ...: as `dstune plan --json`.

    Raises:
        UserError: the configuration is wrong.
    """
    from dstune.api.launching import check_overrides
    from dstune.launch.plan import as_json, as_text, configuration, parse, plan_of

    words = [*([] if run is None else [os.fspath(run)]), *overrides]
    check_overrides(words)
    numbers = {"hardware": hardware, "nodes": nodes, "price": price}
    arguments = parse([*words, *(f"{name}={value}" for name, value in numbers.items() if value is not None)])
    config = configuration(arguments)
    estimate = plan_of(config, arguments)
    return Plan(as_json(estimate, arguments.price, config), as_text(estimate, arguments.price, config))


class Loaded:
    """A model kept in memory: the last one used, of one run, export or model."""

    def __init__(self, model: Any):
        self._path = os.fspath(model)
        self._key: tuple[Any, ...] | None = None
        self._model: Any = None
        self._open = ExitStack()

    def forget(self) -> None:
        """Free the memory, because the run is about to change."""
        self._open.close()
        self._key, self._model = None, None

    def predict(
        self,
        rows: Any,
        overrides: Sequence[str],
        *,
        checkpoint: str | int,
        batch_size: int = 32,
        probabilities: bool = False,
    ) -> list[dict[str, Any]]:
        """See `predict`."""
        from dstune.api.launching import check_overrides
        from dstune.api.rows import iterate_rows
        from dstune.config.data_schema import OnBadRow
        from dstune.config.schema import ModelConfig
        from dstune.inference.load import find, load
        from dstune.inference.rows import Rows as Questions
        from dstune.protocols import task_of

        check_overrides(overrides)
        _check_batch_size(batch_size, 32)
        request = find(ModelConfig(path=self._path), str(checkpoint), overrides)
        places_and_columns = [(f"row {number}", _columns(row)) for number, row in enumerate(iterate_rows(rows), 1)]
        if not places_and_columns:
            return []
        question = task_of(request.config.task).question(request.labels, request.config.data)
        questions = Questions(question, places_and_columns, [], OnBadRow.error)

        def loaded() -> Predictor:
            with tempfile.TemporaryDirectory(prefix="dstune-") as scratch:
                return load(request, Path(scratch))

        model: Predictor = self._loaded(("predict", request.config, request.identity), loaded)
        return [
            answer
            for block in questions.blocks(512)
            for answer in model.answers(block, batch_size, all_labels=probabilities)
        ]

    def generate(
        self,
        prompt: Any,
        *,
        checkpoint: str | int,
        batch_size: int = 8,
        system: str | None = None,
        plain: bool = False,
        **sampling: Any,
    ) -> Any:
        """See `generate`."""
        from dstune.checkpoint import store
        from dstune.config.schema import ModelConfig
        from dstune.inference.voices import open_speaker
        from dstune.inference.writer import Writer

        checkpoint = str(checkpoint)
        _check_batch_size(batch_size, 8)
        is_single = isinstance(prompt, str) or _is_conversation(prompt)
        if not is_single and (isinstance(prompt, Mapping) or not isinstance(prompt, Iterable)):
            fix = 'a text, a conversation such as [{"role": "user", "content": "Hi"}], or a list of either'
            raise UserError(Problem("prompt", "expected texts or conversations", fix, repr(prompt)[:80]))
        requests = [_request(text, number) for number, text in enumerate([prompt] if is_single else prompt, 1)]
        sampling_options = _sampling(sampling)
        newest = store.newest(Path(self._path)) if checkpoint == "last" else None

        def loaded() -> Speaker:
            return self._open.enter_context(open_speaker(ModelConfig(path=self._path), checkpoint, {}))

        speaker: Speaker = self._loaded(("generate", checkpoint, newest), loaded)
        writer = Writer(speaker, sampling_options, plain=plain, system=system)
        answers = [
            answer.text
            for start in range(0, len(requests), batch_size)
            for answer in writer.answer(requests[start : start + batch_size], start // batch_size)
        ]
        return answers[0] if is_single else answers

    def _loaded(self, key: tuple[Any, ...], load: Callable[[], Any]) -> Any:
        if self._key != key:
            self.forget()
            self._model = load()
            self._key = key
        return self._model


def _check_batch_size(size: Any, default: int) -> None:
    if not isinstance(size, Integral) or size < 1:
        raise UserError(Problem("batch_size", "must be a number of at least 1", f"batch_size={default}", repr(size)))


def _columns(row: Any) -> str | dict[str, Any] | ValueError:
    """Return a text or the columns of a row, or the error, so that bad rows of every kind are listed together."""
    from dstune.api.rows import plain_row

    try:
        return row if isinstance(row, str) else plain_row(row)
    except ValueError as error:
        return error


def _is_conversation(prompt: Any) -> bool:
    return isinstance(prompt, Sequence) and bool(prompt) and isinstance(prompt[0], Mapping)


def _request(prompt: Any, number: int) -> Any:
    from dstune.inference.prompts import Request, request_of

    where = f"prompt {number}"
    if isinstance(prompt, str) and prompt.strip():
        return Request(prompt, where)
    if _is_conversation(prompt):
        try:
            return request_of([dict(message) for message in prompt], where)
        except ValueError as error:
            raise UserError(Problem(where, str(error))) from None
    raise UserError(Problem(where, "expected a text that is not empty, or a list of messages", value=repr(prompt)[:80]))


def _sampling(options: Mapping[str, Any]) -> Any:
    from dataclasses import fields

    from dstune.config.names import nearest
    from dstune.inference.writer import Sampling

    names = [field.name for field in fields(Sampling)]
    problems = []
    for name in options:
        if name not in names:
            similar = nearest(name, names)
            fix = f"did you mean {similar}?" if similar else f"one of {', '.join(names)}"
            problems.append(Problem(name, "generate has no such option", fix))
    if problems:
        raise UserError(problems)
    kinds: dict[str, tuple[str, type]] = dict.fromkeys(
        ("max_new_tokens", "top_k", "seed"), ("a whole number", Integral)
    )
    kinds |= dict.fromkeys(("temperature", "top_p"), ("a number", Real))
    for name, (kind, cls) in kinds.items():
        value = options.get(name, getattr(Sampling, name))
        if not isinstance(value, cls) or isinstance(value, bool):
            fix = f"{name}={getattr(Sampling, name)} is the default"
            problems.append(Problem(name, f"expected {kind}", fix, repr(value)[:80]))
    stop = options.get("stop", ())
    texts = [stop] if isinstance(stop, str) else stop
    if not isinstance(texts, (list, tuple)) or not all(isinstance(text, str) for text in texts):
        problems.append(Problem("stop", "expected a text or a list of texts", 'stop=["\\n"]', repr(stop)[:80]))
    if problems:
        raise UserError(problems)
    sampling = Sampling(**{**options, "stop": tuple(texts)})
    problems += [
        Problem(name, f"must be at least {least}", fix, str(value))
        for name, least, fix in (
            ("max_new_tokens", 1, "max_new_tokens=256"),
            ("top_k", 0, "top_k=0 samples from all tokens"),
            ("temperature", 0, "temperature=0 is greedy"),
        )
        if not (value := getattr(sampling, name)) >= least
    ]
    if not 0 < sampling.top_p <= 1:
        fix = "top_p=1 samples from all tokens"
        problems.append(Problem("top_p", "must be more than 0 and at most 1", fix, str(sampling.top_p)))
    if not sampling.temperature and (sampling.top_p != 1 or sampling.top_k):
        problems.append(Problem("temperature", "top_p and top_k need a temperature above 0", "temperature=0.7", "0"))
    if problems:
        raise UserError(problems)
    return sampling
