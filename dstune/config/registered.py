"""Pins models of a model registry (`models:/NAME@ALIAS` instead of a path) to a version and fetches them once into the cache."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote

from filelock import FileLock

from dstune.core import files
from dstune.core.errors import Problem, UserError
from dstune.core.parsing import object_in
from dstune.core.paths import cache_root
from dstune.protocols import MODEL_REGISTRIES
from dstune.protocols.model_registry import ReadsVersions

ORIGIN = "ORIGIN.json"


def registry_of(path: str | None) -> ReadsVersions | None:
    """Return the registry of an address such as `models:/NAME`; None for every other path."""
    scheme, colon, path_below = (path or "").partition(":/")
    if not colon or path_below.startswith("/") or not scheme.isidentifier() or scheme not in MODEL_REGISTRIES:
        return None
    registry = MODEL_REGISTRIES[scheme]()
    return registry if isinstance(registry, ReadsVersions) else None


def pin(address: str, key: str) -> str:
    """Return the address of the version that `address` means now. key: the key that problems name. Raises UserError."""
    registry = registry_of(address)
    assert registry is not None
    return registry.pin(address, key)


def folder_of(pinned: str) -> Path:
    """Return the folder of a version in the cache, whether it exists or not."""
    scheme, _, path_below = pinned.partition(":/")
    return cache_root().joinpath(
        "registry", scheme, *(quote(part, safe="") for part in path_below.split("/")), "export"
    )


def fetch(pinned: str, key: str, stage: Callable[[str], None]) -> Path:
    """Return the folder of a version; fetch it if it is not in the cache.

    Raises UserError if it cannot be fetched, or if the cache has a version of this name from another registry.
    """
    registry, folder = registry_of(pinned), folder_of(pinned)
    assert registry is not None
    origin, place = registry.origin(), folder.parent
    if _origin_of(place) is None:
        place.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(place.with_name(f"{place.name}.lock")):
            if _origin_of(place) is None:
                stage(f"fetching {pinned}")
                with tempfile.TemporaryDirectory(dir=place.parent, prefix=".incomplete-") as scratch:
                    incomplete = Path(scratch) / place.name
                    incomplete.mkdir()
                    registry.fetch(pinned, incomplete / folder.name, key)
                    files.write(incomplete / ORIGIN, json.dumps({"origin": origin, "address": pinned}))
                    incomplete.rename(place)
    cached_origin = _origin_of(place)
    if origin and cached_origin != origin:
        reason = f"the version in the cache comes from another registry ({cached_origin}, not {origin})"
        raise UserError(Problem(key, reason, f"remove {place}, if no run needs it", pinned))
    return folder


def _origin_of(place: Path) -> str | None:
    """Return the registry that the complete version in `place` came from; None if there is no complete version."""
    return str(object_in(place / ORIGIN).get("origin", "")) if (place / ORIGIN).is_file() else None


def local_path(path: str, key: str, stage: Callable[[str], None] | None = None) -> str:
    """Pin and fetch a registered model and return its folder; return every other path unchanged. Raises UserError."""
    if registry_of(path) is None:
        return path
    report = stage or (lambda text: print(f"dstune: {text}", file=sys.stderr, flush=True))
    pinned = pin(path, key)
    if pinned != path:
        report(f"{path} is {pinned}")
    return str(fetch(pinned, key, report))


def fetched_path(path: str) -> str:
    """Return the folder of a registered model that preflight has fetched; return every other path unchanged."""
    return path if registry_of(path) is None else str(folder_of(path))
