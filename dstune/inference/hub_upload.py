"""`dstune export RUN --push OWNER/NAME`: uploads an export to a repository of the Hugging Face hub.

A new repository is private. The hub is asked for permission before the export is made, so that no long export is made in vain.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dstune.checkpoint.record import NAME as RECORD_FILE
from dstune.checkpoint.record import read_record
from dstune.config.schema import ModelConfig
from dstune.core.errors import Problem, UserError
from dstune.core.model_names import HUB_ID
from dstune.core.paths import REFERENCE_FILE
from dstune.launch.hub import is_connection_problem, is_offline
from dstune.samples import is_sample

FLAG = "--push"
REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
TOKENS = "https://huggingface.co/settings/tokens"
NEVER_UPLOADED = (REFERENCE_FILE, f"**/{REFERENCE_FILE}")
"""Patterns of files that stay on this machine: a reference holds rows of the user's data."""


def check_repository(name: str, *, public: bool) -> None:
    """Check that the export may be uploaded to the repository `name`, before the export is made.

    public: whether the user allows everybody to read it.

    Raises:
        UserError: `name` is not OWNER/NAME; the hub is switched off or cannot be reached; there is no token, or it may not write
            there; or the repository is public already and `public` is false.
    """
    if not REPOSITORY.fullmatch(name):
        raise UserError(Problem(FLAG, "is not OWNER/NAME of a repository of the hub", f"{FLAG} my-name/my-model", name))
    if is_offline():
        reason = "the hub is switched off here (HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE)"
        raise UserError(Problem(FLAG, reason, f"HF_HUB_OFFLINE=0 dstune export RUN {FLAG} {name}", name))
    from huggingface_hub import HfApi, get_token

    if get_token() is None:
        fix = f"`hf auth login`, or HF_TOKEN=..., with a token that may write ({TOKENS})"
        raise UserError(Problem(FLAG, "there is no token of the hub on this machine", fix, name))
    hub = HfApi()
    _check_owner(name, _call_hub(name, hub.whoami))
    if _call_hub(name, lambda: _is_public(hub, name)) and not public:
        reason = "this repository exists and is public: everybody could read these weights"
        raise UserError(Problem(FLAG, reason, "add --public if they may, or give another name", name))


def check_base(model: ModelConfig) -> None:
    """Check that others can load the base model of an adapter. Raises UserError if it is a path of this machine or a sample."""
    if is_sample(model.path) or not HUB_ID.fullmatch(model.path) or Path(model.path).exists():
        reason = (
            f"the adapter names its base model by a path of this machine ({model.path}), so nobody else could load it"
        )
        raise UserError(
            Problem(FLAG, reason, "add --merge, which uploads a complete model, or train from an id of the hub")
        )


def upload(folder: Path, name: str, *, public: bool) -> str:
    """Upload the export in `folder` as one commit and return the commit's URL.

    Files of earlier commits that `folder` does not have stay in the repository. `reference.json` is not uploaded: it holds rows
    of the user's data.

    Raises:
        UserError: the hub refused the upload or cannot be reached; the export stays in `folder`.
    """
    from huggingface_hub import HfApi

    hub = HfApi()
    record = read_record(folder) if (folder / RECORD_FILE).is_file() else {}
    title = f"dstune export of step {record['step']}" if "step" in record else "dstune export"

    def create_and_upload() -> Any:
        hub.create_repo(name, private=not public, exist_ok=True)
        return hub.upload_folder(
            repo_id=name, folder_path=folder, commit_message=title, ignore_patterns=list(NEVER_UPLOADED)
        )

    return str(_call_hub(name, create_and_upload, export=folder).commit_url)


def _check_owner(name: str, account: Mapping[str, Any]) -> None:
    """Check that the token may write to the owner of `name`. account: the hub's answer to `whoami`. Raises UserError."""
    owner, _, model = name.partition("/")
    user = str(account.get("name"))
    token = (account.get("auth") or {}).get("accessToken") or {}
    if token.get("role") == "read":
        reason = f"the token of {user} may only read"
        raise UserError(Problem(FLAG, reason, f"make one that may write ({TOKENS}), then `hf auth login`", name))
    owners = [user, *(str(organization.get("name")) for organization in account.get("orgs") or ())]
    if owner.lower() not in map(str.lower, owners):
        reason = f"the token belongs to {user}, who may not write to {owner}"
        raise UserError(Problem(FLAG, reason, f"{FLAG} {user}/{model}, or log in with another token", name))


def _is_public(hub: Any, name: str) -> bool:
    """Return whether the repository exists and everybody may read it."""
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        return not hub.model_info(name).private
    except RepositoryNotFoundError:
        return False


def _call_hub(name: str, request: Callable[[], Any], *, export: Path | None = None) -> Any:
    """Return what `request` returns, with errors of the hub and the connection as UserError. export: the finished export, if there
    is one."""
    try:
        return request()
    except Exception as error:  # the classes differ between releases of huggingface_hub and its HTTP libraries
        status = getattr(getattr(error, "response", None), "status_code", None)
        repeat_hint = f"; the export is complete in {export}: add --force to the same command" if export else ""
        if status == 401:
            fix = f"make a new one ({TOKENS}), then `hf auth login`{repeat_hint}"
            raise UserError(
                Problem(FLAG, "the hub does not accept the token of this machine (401)", fix, name)
            ) from error
        if status == 403:
            fix = f"a token with write access to {name} ({TOKENS}), then `hf auth login`{repeat_hint}"
            raise UserError(Problem(FLAG, "the hub does not let this token write there (403)", fix, name)) from error
        if status is not None and 400 <= status < 500 and status != 429:
            reason = f"the hub refuses this ({status}): {str(error).splitlines()[-1][:200]}"
            raise UserError(Problem(FLAG, reason, f"see https://huggingface.co/{name}{repeat_hint}", name)) from error
        if not is_connection_problem(error):
            raise
        reason = f"the hub cannot be reached ({type(error).__name__})"
        raise UserError(Problem(FLAG, reason, f"try again when there is a connection{repeat_hint}", name)) from error
