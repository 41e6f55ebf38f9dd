"""Resolves and downloads data sets of the hub before the ranks start.

A revision becomes a commit, which `datasets` downloads and prepares. Ranks never contact the hub: they read the Arrow files of
that commit from the cache of `datasets`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from dstune.config.data_schema import DataConfig
from dstune.core.errors import Problem, UserError, first_line
from dstune.data.hub import HubName, Prepared, cached, hub_name, subset_key, subset_problem
from dstune.data.inputs import PARTS
from dstune.launch.hub import HubRequest, is_connection_problem, is_offline, refusal

Stage = Callable[[str], None]


def resolve(data: DataConfig, stage: Stage) -> DataConfig:
    """Return `data` with a commit for the revision of every hub data set, and the name of its configuration; fill the cache.

    If all parts come from one repository, `data.revision` and `data.subset` hold these. Otherwise each path gets its own commit
    (`OWNER/NAME@COMMIT:SPLIT`).

    Raises:
        UserError: a data set is absent, private, gated, offline and not cached, or not readable by `datasets`; lists all problems.
    """
    problems: list[Problem] = []
    prepared: dict[tuple[HubName, str | None], Prepared] = {}

    def prepare_once(name: HubName, revision: str | None, subset: str | None, key: str) -> Prepared | None:
        repository = replace(name, revision=name.revision or revision, split=None)
        try:
            if (repository, subset) not in prepared:
                prepared[repository, subset] = fetch(repository, subset, key, stage)
            return prepared[repository, subset]
        except UserError as error:
            problems.extend(problem for problem in error.problems if problem not in problems)
            return None

    entry_by_part: dict[str, tuple[HubName, Prepared]] = {}
    name_by_part = {part: name for part in PARTS if (name := hub_name(getattr(data, part) or ""))}
    for part, name in name_by_part.items():
        if entry := prepare_once(name, data.revision, data.subset, f"data.{part}"):
            entry_by_part[part] = name, entry
    mixture = dict(data.mixture)
    for source, source_config in data.mixture.items():
        if name := hub_name(source_config.path):
            key = f"data.mixture.{source}.path"
            if entry := prepare_once(name, source_config.revision, source_config.subset, key):
                path = str(replace(name, revision=None))
                mixture[source] = replace(source_config, path=path, revision=entry.commit, subset=entry.subset)
        else:
            problems += _unused_key_problems(source_config.revision, source_config.subset, f"data.mixture.{source}")
    if not name_by_part:
        problems += _unused_key_problems(data.revision, data.subset, "data")
    if problems:
        raise UserError(problems)
    data = replace(data, mixture=mixture)
    if len({(name.repository, entry.commit, entry.subset) for name, entry in entry_by_part.values()}) == 1:
        _, entry = next(iter(entry_by_part.values()))
        paths: dict[str, Any] = {part: str(replace(name, revision=None)) for part, (name, _) in entry_by_part.items()}
        return replace(data, revision=entry.commit, subset=entry.subset, **paths)
    pinned: dict[str, Any] = {
        part: str(replace(name, revision=entry.commit)) for part, (name, entry) in entry_by_part.items()
    }
    return replace(data, **pinned)


def _unused_key_problems(revision: str | None, subset: str | None, section: str) -> list[Problem]:
    """Return a problem for each of the two keys that is given although the section's rows do not come from the hub."""
    reason = "no rows come from the hub, and nothing else has it"
    return [
        Problem(f"{section}.{key}", reason, f"{section}.{key}=null", value)
        for key, value in (("revision", revision), ("subset", subset))
        if value is not None
    ]


def fetch(name: HubName, subset: str | None, key: str, stage: Stage) -> Prepared:
    """Download the data set at the commit of `name.revision` (None: the main branch) into the cache, and return it.

    Offline (HF_HUB_OFFLINE=1, or no connection) the cache must hold it already. key: the key that gave the name. Raises UserError.
    """
    if is_offline():
        return cached(name, subset, key, "HF_HUB_OFFLINE is set")
    revision_key = f"{subset_key(key).removesuffix('subset')}revision"
    request = HubRequest("data set", key, revision_key, name.repository, name.revision)
    try:
        return _prepare(name, subset, request, stage)
    except UserError:
        raise
    except Exception as error:  # its class depends on the releases of datasets, huggingface_hub and its HTTP libraries
        problem = refusal(request, error)
        if problem is not None:
            raise UserError(problem) from error
        if not is_connection_problem(error):
            raise
        entry = cached(name, subset, key, f"the hub cannot be reached: {type(error).__name__}")
        stage(f"the hub cannot be reached; using {name.repository} as cached, commit {entry.commit[:12]}")
        return entry


def _prepare(name: HubName, subset: str | None, request: HubRequest, stage: Stage) -> Prepared:
    import datasets
    from datasets.exceptions import DatasetGenerationError
    from huggingface_hub import HfApi

    commit = str(HfApi().dataset_info(name.repository, revision=name.revision, timeout=30).sha)
    stage(f"data set {name.repository} at commit {commit[:12]}")
    with _progress(sys.stderr.isatty()):
        try:
            builder = datasets.load_dataset_builder(name.repository, subset, revision=commit)
            if builder.hash != commit:
                # If datasets cannot get the commit, it silently uses any other commit that its cache has.
                raise ConnectionError(f"{name.repository} at commit {commit} could not be loaded")
            builder.download_and_prepare()
        except ValueError as error:
            raise UserError(_unknown_subset(name, subset, commit, request)) from error
        except (FileNotFoundError, RuntimeError, DatasetGenerationError) as error:
            if isinstance(error.__cause__, Exception) and is_connection_problem(error.__cause__):
                raise error.__cause__ from error
            raise UserError(_unreadable(error, request)) from error
    return cached(replace(name, revision=commit), builder.config.name, request.key)


def _unknown_subset(name: HubName, subset: str | None, commit: str, request: HubRequest) -> Problem:
    import datasets

    names = datasets.get_dataset_config_names(name.repository, revision=commit)
    return subset_problem(subset_key(request.key), subset, sorted(names))


def _unreadable(error: Exception, request: HubRequest) -> Problem:
    """Return what keeps `datasets` from reading a repository that is there."""
    cause: BaseException = error.__cause__ or error
    text = first_line(cause)
    if "scripts are no longer supported" in str(error):
        reason = "it is a Python script, which datasets no longer runs"
        fix = f"{request.revision_key}=refs/convert/parquet, where the hub keeps a copy as Parquet"
        return Problem(request.key, reason, fix, request.name)
    fix = f"look at its files at {request.page}/tree/main, download them and give their path"
    return Problem(request.key, f"datasets cannot read it: {text}", fix, request.name)


@contextmanager
def _progress(is_shown: bool) -> Iterator[None]:
    """Show the bars of `datasets` on a terminal, and none in a log."""
    import datasets

    was_enabled: Any = datasets.is_progress_bar_enabled()
    if not is_shown:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        if was_enabled:
            datasets.enable_progress_bars()
