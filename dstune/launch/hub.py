"""Fetches a model from the hub: resolves its revision to a commit, downloads its files, and explains the hub's refusals.

Files are chosen by name, so that only one format is downloaded if a repository has the same weights in several.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dstune.config.schema import InitialWeights, ModelConfig
from dstune.core.errors import Problem, UserError

WEIGHTS = re.compile(r"(model(-\d+-of-\d+)?\.safetensors)|(model\.safetensors\.index\.json)")
ANY_WEIGHTS = re.compile(r"[^/]+\.safetensors(\.index\.json)?")
SMALL = re.compile(r"[^/]+\.(json|jinja|model|txt)|merges\.txt|additional_chat_templates/[^/]+\.jinja")
CODE = re.compile(r".+\.py")


def fetch(
    config: ModelConfig, stage: Callable[[str], None], check_description: Callable[[Path], None]
) -> tuple[str, Path]:
    """Return the commit that `config.revision` (the main branch if None) stands for, and the folder with its files.

    Offline (HF_HUB_OFFLINE=1, or no connection), the files must be in the cache. stage: shows a line of progress.
    check_description: called with the folder before the weights are downloaded into it; may raise UserError.

    Raises:
        UserError: the model is absent, private or gated; it is not in the cache while offline; or it has no safetensors.
    """
    if is_offline():
        snapshot = _cached(config, "HF_HUB_OFFLINE is set")
        return snapshot.name, snapshot
    try:
        return _download(config, stage, check_description)
    except UserError:
        raise
    except Exception as error:  # classes differ among the releases of huggingface_hub and its HTTP libraries
        problem = refusal(HubRequest("model", "model.path", "model.revision", config.path, config.revision), error)
        if problem is not None:
            raise UserError(problem) from error
        if not is_connection_problem(error):
            raise
        snapshot = _cached(config, f"the hub cannot be reached ({type(error).__name__})")
        stage(f"the hub cannot be reached; using {config.path} as cached, commit {snapshot.name[:12]}")
        return snapshot.name, snapshot


def is_offline() -> bool:
    """Return whether an environment variable forbids contact with the hub."""
    words = (os.environ.get("HF_HUB_OFFLINE", ""), os.environ.get("TRANSFORMERS_OFFLINE", ""))
    return any(word.upper() in ("1", "ON", "YES", "TRUE") for word in words)


def _download(
    config: ModelConfig, stage: Callable[[str], None], check_description: Callable[[Path], None]
) -> tuple[str, Path]:
    from huggingface_hub import HfApi, snapshot_download

    info = HfApi().model_info(config.path, revision=config.revision, timeout=30)
    commit = str(info.sha)
    names = [file.rfilename for file in info.siblings or []]
    small = [name for name in names if SMALL.fullmatch(name) or (config.trust_remote_code and CODE.fullmatch(name))]
    weights = weight_files(config, names) if config.weights is InitialWeights.pretrained else []
    stage(f"model {config.path} at commit {commit[:12]}")
    folder = Path(snapshot_download(config.path, revision=commit, allow_patterns=small))
    check_description(folder)
    if weights:
        snapshot_download(config.path, revision=commit, allow_patterns=weights)
    return commit, folder


def weight_files(config: ModelConfig, names: Sequence[str]) -> list[str]:
    """Return the names of the weight files to download: `model*.safetensors`, else any other safetensors.

    Raises:
        UserError: there are none.
    """
    for pattern in (WEIGHTS, ANY_WEIGHTS):
        if files := [name for name in names if pattern.fullmatch(name)]:
            return files
    if "adapter_config.json" in names and "config.json" not in names:
        reason, fix = "this is an adapter, not a model", "name its base model"
    elif any(name.endswith((".bin", ".pt", ".pth")) for name in names):
        reason = "only pickled weights (.bin) are there, which may run code when they are loaded"
        fix = f"give a model.revision with safetensors (see {page(config)}/tree), or convert it yourself"
    else:
        reason, fix = "there are no weights (*.safetensors) in it", f"see {page(config)}/tree/main"
    raise UserError(Problem("model.path", reason, fix, config.path))


def page(config: ModelConfig) -> str:
    """Return the address of the model's page."""
    return f"https://huggingface.co/{config.path}"


def _cached(config: ModelConfig, why: str) -> Path:
    from huggingface_hub import snapshot_download

    at = f" at revision {config.revision}" if config.revision else ""
    reason = f"{why}, and the cache does not hold this model{at}"
    if Path(config.path).parent != Path() and Path(config.path).parent.is_dir():
        reason += f"; nor is there such a folder in {Path(config.path).parent}"
    revision = f" --revision {config.revision}" if config.revision else ""
    fix = (
        f"run `hf download {config.path}{revision}` where there is a connection: it fills the cache (HF_HOME), or with "
        f"--local-dir DIR a folder to give instead; if the model is gated, first accept its terms at {page(config)} and log in "
        "with `hf auth login`"
    )
    try:
        # One file is enough to find the snapshot; its folder then shows whether the weights are there.
        folder = snapshot_download(
            config.path, revision=config.revision, local_files_only=True, allow_patterns=["config.json"]
        )
    except (OSError, ValueError) as error:
        raise UserError(Problem("model.path", reason, fix, config.path)) from error
    suffixes = {file.suffix for file in Path(folder).iterdir()}
    if config.weights is InitialWeights.pretrained and not suffixes & {".safetensors", ".bin", ".pt"}:
        raise UserError(
            Problem("model.path", f"{why}, and the cache holds this model without its weights", fix, config.path)
        )
    return Path(folder)


@dataclass(frozen=True)
class HubRequest:
    """What was requested from the hub, and the keys that requested it."""

    kind: str
    """`model` or `data set`."""
    key: str
    revision_key: str
    name: str
    """`OWNER/NAME`."""
    revision: str | None

    @property
    def page(self) -> str:
        """The address of its page."""
        return f"https://huggingface.co/{'' if self.kind == 'model' else 'datasets/'}{self.name}"


def refusal(request: HubRequest, error: Exception) -> Problem | None:
    """Return a problem with a fix if the hub refused the request or its cache cannot be written; None for other errors."""
    from huggingface_hub import errors

    key, kind, page = request.key, request.kind, request.page
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
        reason = f"the hub's cache cannot be written ({error.strerror})"
        return Problem("HF_HOME", reason, "set HF_HOME to a writable folder with free space", str(error.filename or ""))
    signed_in = "log in with `hf auth login` or set HF_TOKEN"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.GatedRepoError):
        reason = f"access to this {kind} has to be granted"
        return Problem(key, reason, f"request access at {page}, then {signed_in}", request.name)
    if isinstance(error, errors.RevisionNotFoundError):
        fix = f"see the branches and tags at {page}/tree/main"
        return Problem(request.revision_key, f"{request.name} has no such revision", fix, str(request.revision))
    if isinstance(error, errors.RepositoryNotFoundError):
        # The hub answers 401 without a token both for repositories that do not exist and for private ones.
        local_kind = "folder" if kind == "model" else "file or folder"
        reason = f"the hub has no such {kind}, or it is private, and there is no such {local_kind} either"
        return Problem(key, reason, f"check {page}; if it is private, {signed_in}", request.name)
    if isinstance(error, errors.HFValidationError):
        reason = "this is neither a folder nor a hub id"
        return Problem(key, reason, "give a folder, OWNER/NAME or a sample:// name", request.name)
    if status in (401, 403):
        reason = f"the hub refuses access ({status})"
        return Problem(key, reason, f"see {page}, then {signed_in}", request.name)
    if status == 404:
        return Problem(key, "the hub does not have it (404)", f"check {page}", request.name)
    return None


def is_connection_problem(error: BaseException) -> bool:
    """Return whether the error is a failed connection: a time-out, a refusal, a failing name server, or a failure of the hub (5xx,
    429)."""
    causes: list[Any] = [error]
    while causes[-1].__cause__ is not None:
        causes.append(causes[-1].__cause__)
    return any(
        isinstance(cause, OSError)
        or type(cause).__module__.split(".")[0] in ("httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3")
        for cause in causes
    )
