"""Resolves `models:/NAME@ALIAS` and `models:/NAME/VERSION` to a version and fetches its files."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from pathlib import Path

from dstune.core.errors import Problem, UserError
from dstune.lakehouse.register import DIGEST, PLACE, client_for, digest_of, tags_of, user_errors_for, version_of_alias

PINNED = re.compile(r"models:/+(?P<name>[^@/:'\"]+)/(?P<version>[0-9]+)")
ADDRESSES = "models:/NAME@ALIAS or models:/NAME/VERSION"
_CREDENTIALS = re.compile(r"//[^/@]*@")


def pin(address: str, key: str) -> str:
    """Return the address of the version that an alias points to. Raises UserError if there is no such alias, or the address names
    no version."""
    if pinned := PINNED.fullmatch(address):
        return f"models:/{pinned['name']}/{int(pinned['version'])}"
    place = PLACE.fullmatch(address)
    if place is None or place["alias"] is None:
        reason = "names no version of a registered model"
        raise UserError(Problem(key, reason, ADDRESSES, address))
    name, alias = place["name"], place["alias"]
    client = client_for(name, None, key)
    with user_errors_for(address, key):
        version = version_of_alias(client, name, alias)
        if version is None:
            aliases = ", ".join(sorted(client.get_registered_model(name).aliases)) or "none"
            raise UserError(Problem(key, f"the model has no such alias; it has {aliases}", ADDRESSES, address))
    return f"models:/{name}/{int(version)}"


def origin() -> str:
    """Return the origin of MLFLOW_REGISTRY_URI or MLFLOW_TRACKING_URI, without credentials."""
    uri = os.environ.get("MLFLOW_REGISTRY_URI") or os.environ.get("MLFLOW_TRACKING_URI") or ""
    return _CREDENTIALS.sub("//", uri)


def fetch(pinned: str, folder: Path, key: str) -> None:
    """Fetch a version into `folder`. Raises UserError if it cannot be fetched, holds no model of transformers or peft, or is not
    what was registered."""
    place = PINNED.fullmatch(pinned)
    assert place is not None, "an address is pinned before it is fetched"
    client = client_for(place["name"], None, key)
    with user_errors_for(pinned, key), tempfile.TemporaryDirectory(dir=folder.parent, prefix=".download-") as scratch:
        import mlflow.artifacts

        tags = tags_of(client, place["name"], place["version"])
        downloaded = Path(mlflow.artifacts.download_artifacts(artifact_uri=pinned, dst_path=scratch))
        export = _export_in(downloaded)
        if export is None:
            reason = "holds no model of transformers or peft: it was registered by another tool, in a form of its own"
            raise UserError(Problem(key, reason, "dstune export RUN --register models:/NAME", pinned))
        if any(path.is_symlink() for path in export.rglob("*")):
            raise UserError(Problem(key, "holds links, which may lead anywhere", "register plain files", pinned))
        if (digest := tags.get(DIGEST)) is not None and digest_of(export) != digest:
            reason = f"its files are not those that were registered: {DIGEST} is that of others"
            raise UserError(Problem(key, reason, "register the export again", pinned))
        shutil.move(export, folder)


def _export_in(downloaded: Path) -> Path | None:
    """Return the dstune export in the download, or the folder in which MLflow's transformers flavour stores a model."""
    for folder in (downloaded / "artifacts" / "export", downloaded / "model", downloaded):
        if any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
            return folder
    return None
