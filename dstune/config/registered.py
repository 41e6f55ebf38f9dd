"""Models in a model registry, `models:/NAME@ALIAS` in place of a path: pinned to a version, and fetched once into the cache."""

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
    """Return the registry that an address names, to read from; None for every other path."""
    scheme, colon, path_below = (path or "").partition(":/")
    if not colon or path_below.startswith("/") or not scheme.isidentifier() or scheme not in MODEL_REGISTRIES:
        return None
    registry = MODEL_REGISTRIES[scheme]()
    return registry if isinstance(registry, ReadsVersions) else None


def pin(address: str, key: str) -> str:
    """Return the address that always means the version that `address` means now. key: what problems name. Raises UserError."""
    registry = registry_of(address)
    assert registry is not None
    return registry.pin(address, key)


def folder_of(pinned: str) -> Path:
    """Return where the cache keeps a version, whether it is there or not."""
    scheme, _, path_below = pinned.partition(":/")
    return cache_root().joinpath(
        "registry", scheme, *(quote(part, safe="") for part in path_below.split("/")), "export"
    )


def fetch(pinned: str, key: str, stage: Callable[[str], None]) -> Path:
    """Return the folder of a version, fetched if the cache has it not. Raises UserError where it cannot be had, or where the cache
    has a version of this name from another registry."""
    registry, folder = registry_of(pinned), folder_of(pinned)
    assert registry is not None
    origin, place = registry.origin(), folder.parent
    if _origin_of(place) is None:
        place.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(place.with_name(f"{place.name}.lock")):
            if _origin_of(place) is None:
                stage(f"fetching {pinned}")
                with tempfile.TemporaryDirectory(dir=place.parent, prefix=".incomplete-") as scratch:
                    made = Path(scratch) / place.name
                    made.mkdir()
                    registry.fetch(pinned, made / folder.name, key)
                    files.write(made / ORIGIN, json.dumps({"origin": origin, "address": pinned}))
                    made.rename(place)
    cached_origin = _origin_of(place)
    if origin and cached_origin != origin:
        reason = f"the cache has this version of another registry ({cached_origin}), and this one is {origin}"
        raise UserError(Problem(key, reason, f"remove {place}, if no run needs it", pinned))
    return folder


def _origin_of(place: Path) -> str | None:
    """Return the registry of a complete version; None where there is none."""
    return str(object_in(place / ORIGIN).get("origin", "")) if (place / ORIGIN).is_file() else None


def local_path(path: str, key: str, stage: Callable[[str], None] | None = None) -> str:
    """Return the folder of a registered model, pinned now and fetched, and every other path as it is. Raises UserError."""
    if registry_of(path) is None:
        return path
    report = stage or (lambda text: print(f"dstune: {text}", file=sys.stderr, flush=True))
    pinned = pin(path, key)
    if pinned != path:
        report(f"{path} is {pinned}")
    return str(fetch(pinned, key, report))


def fetched_path(path: str) -> str:
    """Return the folder of a registered model that preflight has pinned and fetched, and every other path as it is."""
    return path if registry_of(path) is None else str(folder_of(path))
