"""Writes and reads `run.yaml`, the composed configuration of a run. It is written once and read by everything that follows."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dstune import __version__
from dstune.config.convert import dump, from_dict, load, to_dict
from dstune.config.schema import RunConfig
from dstune.config.trust import SIGNATURE, Use, cleared, cleared_beside, statement
from dstune.core import files, plugins, signing
from dstune.core.errors import Problem, UserError
from dstune.core.parsing import read_file
from dstune.core.plugins import Plugin
from dstune.core.rank_env import RUN_SHA256


@dataclass(frozen=True)
class Composed:
    config: RunConfig
    overrides: list[str]
    """The overrides of the command line, including `experiment=quickstart` if that was added by default."""
    plugins: tuple[Plugin, ...] = ()
    config_dirs: tuple[str, ...] = ()
    """Folders of the user's own groups."""
    origins: Mapping[str, str] = field(default_factory=dict)
    """By key, the origin of values that are neither given by the user nor defaults of the schema."""


RUN_FORMAT = 5
"""Format number of `run.yaml`; a file of format 1 has none.

Up to format 2, `method.init=olora` meant what `qr` means now. Up to 3, parts of a model that text never reaches were trained. Up to
4, nothing checked whether a model reads padding.
"""


def write_run(path: Path, composed: Composed, *, signature_of: Path | None = None) -> None:
    """Write `run.yaml`: the version, the overrides given, the plugins (their files are copied beside it), the resolved
    configuration, secrets by reference only, and the signature of this user.

    signature_of: in a rank, which signs nothing: the `run.yaml` that this one is derived from.
    """
    content: dict[str, Any] = {
        "dstune_version": __version__,
        "overrides": list(composed.overrides),
        **({"plugins": plugins.to_dicts(composed.plugins)} if composed.plugins else {}),
        **({"origins": dict(composed.origins)} if composed.origins else {}),
        "config": to_dict(composed.config),
    }
    plugins.install(composed.plugins, path.parent)
    if signature_of is None:
        write_signed(path, content)
    else:
        parent_content = read_run_content(signature_of) if signature_of.is_file() else {}
        _write_content(path, content, parent_content.get(SIGNATURE))


def write_signed(path: Path, content: Mapping[str, Any]) -> bool:
    """Write the content of a `run.yaml` with the signature of this user. Returns whether the user has a key to sign with."""
    signature = signing.sign(statement(content))
    _write_content(path, content, signature)
    return signature is not None


def _write_content(path: Path, content: Mapping[str, Any], signature: Any) -> None:
    signed = {} if signature is None else {SIGNATURE: signature}
    text = dump({"format": RUN_FORMAT} | {**content, "format": RUN_FORMAT, **signed})
    files.write(path, text)
    _written[path.absolute()] = hashlib.sha256(text.encode()).hexdigest()


_written: dict[Path, str] = {}
"""SHA-256 of each `run.yaml` as this process wrote it last."""


def variables_for_ranks(run_dir: Path) -> dict[str, str]:
    """Return the variables by which ranks tell the `run.yaml` that this process wrote from what somebody else put in its place
    since."""
    sha256 = _written.get((run_dir / "run.yaml").absolute())
    return {} if sha256 is None else {RUN_SHA256: sha256}


def read_run(path: Path, overrides: Sequence[str] | None = None, *, use: Use = Use.everything) -> Composed:
    """Read what `write_run` wrote, also in earlier formats; `${oc.env:KEY}` is read from this process's environment. The run's
    plugins become the active ones.

    overrides: of the command, where it takes any, for `apply_overrides`: what they repeat needs no signature. use: what the verb
    does with the run.

    Raises:
        UserError: no such file, no YAML, a later format, unknown keys, wrong types, a variable that is not set, a plugin that is
            missing or has changed, and what `trust.cleared` refuses.
    """
    plugins.load_built_ins()  # and installed packages, whose fields may be signed ones, whether the file lists them or not
    content = cleared(read_run_content(path), path, use, overrides or ())
    if _activate(content, path, overrides):  # whose classes know more keys
        content = cleared(content, path, use, overrides or ())
    composed = _composed(content, path, ())
    return replace(composed, plugins=plugins.used_by(composed.config))


def read_decided(path: Path) -> Composed:
    """Read as `read_run`, in a rank: the launching process has decided what is believed, and has written the file.

    Raises: as `read_run`, and UserError where the file is not the one that the launching process wrote.
    """
    plugins.load_built_ins()
    content = read_run_content(path, os.environ.get(RUN_SHA256))
    _activate(content, path, None)
    composed = _composed(content, path, ())
    return replace(composed, plugins=plugins.used_by(composed.config))


def _activate(content: Mapping[str, Any], path: Path, overrides: Sequence[str] | None) -> tuple[Plugin, ...]:
    stored = plugins.from_dicts(content.get(plugins.KEY), str(path))
    plugins.activate_stored(stored, path.parent, overrides)
    return stored


def read_run_beside(path: Path, config: RunConfig, given: Sequence[str] = (), *, decided: bool = False) -> Composed:
    """Read as `read_run`, of a run that `plugins.active()` is to continue: the active plugins stay, those of the run are listed.

    config, given, decided: see `trust.cleared_beside`.
    """
    content = cleared_beside(read_run_content(path), path, config, given, decided=decided)
    return _composed(content, path, plugins.from_dicts(content.get(plugins.KEY), str(path)))


def plugins_of(path: Path) -> tuple[Plugin, ...]:
    """Return the plugins that a `run.yaml` lists, none of them loaded. Raises UserError."""
    return plugins.from_dicts(read_run_content(path).get(plugins.KEY), str(path))


def _composed(content: dict[str, Any], path: Path, active: tuple[Plugin, ...]) -> Composed:
    overrides = [str(text) for text in content.get("overrides") or []]
    origins = {str(key): str(origin) for key, origin in (content.get("origins") or {}).items()}
    return Composed(from_dict(content["config"], str(path)), overrides, active, origins=origins)


def read_run_content(path: Path, sha256: str | None = None) -> dict[str, Any]:
    """Return the content of a `run.yaml` of any format up to the present one, as the present one has it. Raises UserError.

    sha256: of the file, where it has to be the one that is known.
    """
    try:
        written = read_file(path)
        if sha256 is not None and hashlib.sha256(written).hexdigest() != sha256:
            reason = "it was changed after the command that started these ranks wrote it"
            fix = f"`dstune train {path.parent}` looks at it again; if others may write into the folder, copy it first"
            raise UserError(Problem(str(path), reason, fix))
        content = load(written.decode("utf-8"), str(path))
    except OSError as error:
        raise UserError(Problem(str(path), f"cannot be read: {error.strerror}", "give a run directory")) from None
    except UnicodeDecodeError:
        raise UserError(Problem(str(path), "this is no run.yaml", "give a run directory")) from None
    if not isinstance(content, dict) or not isinstance(content.get("config"), dict):
        raise UserError(Problem(str(path), "this is no run.yaml: it has no `config`", "give a run directory"))
    version = content.get("format", 1)
    if type(version) is not int or not 1 <= version <= RUN_FORMAT:  # `true` is an int too
        reason = f"this version of dstune reads the formats 1 to {RUN_FORMAT} of run.yaml"
        fix = f"use dstune {content.get('dstune_version')}, which wrote it, or a later version"
        raise UserError(Problem(f"{path}: format", reason, fix, str(version)))
    method = content["config"].get("method")
    if version < 3 and isinstance(method, dict) and method.get("init") == "olora":
        method["init"] = "qr"
    model = content["config"].get("model")
    if version < 4 and isinstance(model, dict):
        model["unreached_parts"] = "trained"
    data = content["config"].get("data")
    if version < 5 and isinstance(data, dict):
        data["padding"] = "tolerated"
    return content
