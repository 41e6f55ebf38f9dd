"""`dstune export --register models:/NAME[@ALIAS]` registers an export in MLflow's model registry, and proves it by loading it back.
Registering the same export again returns the same version. An alias only moves to a version that another process has loaded from
the registry with the export's logits; its previous version gets the alias `ALIAS-previous`."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dstune.checkpoint.record import read_record
from dstune.config.schema import RunConfig
from dstune.core.child_python import child_environment
from dstune.core.errors import DstuneError, Problem, UserError, first_line
from dstune.core.network import ask_no_metadata_service
from dstune.core.parsing import object_in
from dstune.core.paths import REFERENCE_FILE
from dstune.protocols.model_registry import Registered
from dstune.tracking.trackers.mlflow import absolute_store, experiment_of

KEY = "--register"
ADDRESSES = "models:/NAME or models:/CATALOG.SCHEMA.NAME, with @ALIAS to move an alias there"
PLACE = re.compile(r"models:/+(?P<name>[^@/:'\"]+)(?:@(?P<alias>[\w-]+))?")
RESERVED_ALIAS = re.compile(r"latest|v\d+", re.IGNORECASE)
PREVIOUS = "-previous"
DIGEST, PROVEN = "dstune_digest", "dstune_proven"
RESERVED = re.compile(r"[.,\-=/:]")
"""Characters that Unity Catalog refuses in the name of a tag."""
TAG_VALUE = 256
"""The longest tag value that every registry accepts."""
NOT_THE_MODEL = ("README.md", "dstune.json", REFERENCE_FILE, "reference.jsonl")
"""Files of an export that may differ for the same model: times, versions, held-out rows."""
PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "peft", "numpy")
PROOF_SECONDS = 1800.0
EXAMPLE = "input_example.json"


def parse(place: str) -> tuple[str, str | None]:
    """Parse `models:/NAME[@ALIAS]` into name and alias. Raises UserError."""
    match = PLACE.fullmatch(place)
    if match is None:
        raise UserError(Problem(KEY, "is no place in a model registry", ADDRESSES, place))
    if match["alias"] and RESERVED_ALIAS.fullmatch(match["alias"]):
        raise UserError(Problem(KEY, "MLflow keeps this alias for itself", f"models:/{match['name']}@champion", place))
    return match["name"], match["alias"]


def client_for(name: str, config: RunConfig | None, key: str = KEY) -> Any:
    """Return MLflow's client, by MLFLOW_TRACKING_URI and MLFLOW_REGISTRY_URI, or by the run's `tracking.mlflow.uri`. key: the key
    that problems name. Raises UserError if no registry is configured."""
    if find_spec("mlflow") is None:
        raise UserError(
            Problem(key, "the package mlflow is not installed", "pip install '.[mlflow]' in a clone of dstune", name)
        )
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    ask_no_metadata_service()
    os.environ["MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR"] = "false"
    tracking = os.environ.get("MLFLOW_TRACKING_URI")
    uri = None if config is None else config.tracking.mlflow.uri
    if not tracking and uri:
        tracking = absolute_store(str(uri))
    if not tracking:
        fix = "export MLFLOW_TRACKING_URI=http://HOST:PORT (sqlite:///FILE, databricks)"
        raise UserError(Problem(key, "no MLflow server is named", fix, name))
    registry = os.environ.get("MLFLOW_REGISTRY_URI")
    if not registry and name.count(".") == 2 and tracking.startswith("databricks"):
        registry = "databricks-uc"
    os.environ["MLFLOW_TRACKING_URI"] = tracking
    if registry:
        os.environ["MLFLOW_REGISTRY_URI"] = registry
    os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
    import mlflow
    from mlflow.tracking import MlflowClient

    mlflow.set_tracking_uri(tracking)
    if registry:
        mlflow.set_registry_uri(registry)
    return MlflowClient()


def register(
    place: str, export: Path, run_dir: Path, config: RunConfig, message: Callable[[str], None] = lambda text: None
) -> Registered:
    """Register the folder `export` of the run, prove it, and move the alias if one is named. Raises UserError; DstuneError if the
    registered model differs from the export, in which case no alias has moved."""
    name, alias = parse(place)
    client = client_for(name, config)
    digest = digest_of(export)
    with user_errors_for(place):
        existing = _version_with(client, name, digest)
        number = existing or _log(
            client, name, export, digest, _tags(export, run_dir, config), str(config.tracking.project)
        )
        message(f"{name} version {number}" + (" has this export already" if existing else " is registered"))
        if tags_of(client, name, number).get(PROVEN) != digest:
            message("loading it back in another process")
            _prove(name, number, export)
            client.set_model_version_tag(name, number, PROVEN, digest)
        version_before = _move(client, name, alias, number) if alias else None
    return Registered(name, number, existing is None, alias, version_before)


def roll_back(place: str) -> Registered:
    """Point an alias back to its previous version; a second call undoes the first. Raises UserError."""
    name, alias = parse(place)
    if alias is None:
        raise UserError(Problem(KEY, "names no alias to roll back", f"models:/{name}@ALIAS", place))
    client = client_for(name, None)
    with user_errors_for(place):
        version_now, version_before = (
            version_of_alias(client, name, alias),
            version_of_alias(client, name, alias + PREVIOUS),
        )
        if version_before is None:
            reason = f"{alias} has not been moved: there is no {alias}{PREVIOUS}"
            raise UserError(Problem(KEY, reason, "an alias that was moved from one version to another", place))
        client.set_registered_model_alias(name, alias, version_before)
        if version_now is not None:
            client.set_registered_model_alias(name, alias + PREVIOUS, version_now)
    return Registered(name, version_before, False, alias, version_now)


@contextmanager
def user_errors_for(place: str, key: str = KEY) -> Iterator[None]:
    """Convert refusals of the registry, and failures to reach it, into UserError about `key`."""
    try:
        yield
    except DstuneError:
        raise
    except Exception as error:  # MlflowException, and what requests, sqlalchemy and boto raise through it
        reason = f"the registry refuses it: {first_line(error)}"
        raise UserError(Problem(key, reason, "look at MLFLOW_TRACKING_URI and its credentials", place)) from None


def digest_of(export: Path) -> str:
    """Return the digest of all files that determine the model, and of an adapter's task: its labels are only in its record."""
    digest = hashlib.sha256()
    if (export / "adapter_config.json").exists():
        digest.update(json.dumps(read_record(export).get("task"), sort_keys=True).encode())
    for file in sorted(path for path in export.rglob("*") if path.is_file() and path.name not in NOT_THE_MODEL):
        digest.update(f"{file.relative_to(export).as_posix()}\n".encode())
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def _version_with(client: Any, name: str, digest: str) -> str | None:
    """Return the number of the version whose export has this digest; None if there is none. Tags are read version by
    version, since a registry lists versions without them."""
    page = None
    while page is None or page.token:
        page = client.search_model_versions(f"name='{name}'", page_token=None if page is None else page.token)
        for candidate in page:
            if str(candidate.status) == "READY" and tags_of(client, name, candidate.version).get(DIGEST) == digest:
                return str(candidate.version)
    return None


def tags_of(client: Any, name: str, number: str) -> Mapping[str, str]:
    """Return the tags of a version."""
    tags: Mapping[str, str] = client.get_model_version(name, number).tags
    return tags


def _log(client: Any, name: str, export: Path, digest: str, tags: Mapping[str, str], project: str) -> str:
    """Upload the export as a Python model, and register it. Returns its version."""
    import warnings

    import mlflow
    from mlflow.models import Model, ModelSignature
    from mlflow.types import ColSpec, Schema

    code = Path(__file__).with_name("registered_model.py")
    signature = ModelSignature(inputs=Schema([ColSpec("string", "text")]), outputs=Schema([ColSpec("string")]))
    if not {"MLFLOW_EXPERIMENT_NAME", "MLFLOW_EXPERIMENT_ID"} & os.environ.keys():
        mlflow.set_experiment(experiment_of(project, mlflow.get_tracking_uri()))
    with mlflow.start_run(run_name=name) as run, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # advice on type hints and examples
        info = Model.log(
            artifact_path=None,
            flavor=_WithExample,
            name="model",
            python_model=str(code),
            artifacts={"export": str(export)},
            signature=signature,
            metadata=dict(tags),
            pip_requirements=["mlflow", *_requirements()],
            run_id=run.info.run_id,
        )
        mlflow.set_tags(dict(tags))
        run_id = run.info.run_id
    try:
        client.create_registered_model(name)
    except Exception as error:
        if "ALREADY_EXISTS" not in str(getattr(error, "error_code", "")):
            raise
    logged_model = client.create_model_version(
        name, info.model_uri, run_id=run_id, tags={**tags, DIGEST: digest}, model_id=info.model_id
    )
    return str(logged_model.version)


class _WithExample:
    """MLflow's flavour for Python models, with an input example written next to the model. Passing the example to MLflow would make
    it load the model in this process."""

    @staticmethod
    def save_model(path: str, mlflow_model: Any, **settings: Any) -> None:
        import mlflow.pyfunc

        mlflow.pyfunc.save_model(path, mlflow_model=mlflow_model, **settings)
        Path(path, EXAMPLE).write_text(json.dumps({"columns": ["text"], "data": [["An example."]]}))
        mlflow_model.saved_input_example_info = {
            "artifact_path": EXAMPLE,
            "type": "dataframe",
            "pandas_orient": "split",
        }
        mlflow_model.save(str(Path(path, "MLmodel")))


def _requirements() -> list[str]:
    requirements = []
    for package in PACKAGES:
        try:
            requirements.append(f"{package}=={version(package).partition('+')[0]}")
        except PackageNotFoundError:
            continue
    return requirements


def _tags(export: Path, run_dir: Path, config: RunConfig) -> dict[str, str]:
    """Return the provenance of the model as tags: run, step, and the versions of its data."""
    record = read_record(export)
    tags = {"run": config.run.name, "step": str(record.get("step", "")), "task": config.task.name}
    if config.data.train is not None:
        tags["data.train"] = str(config.data.train)
    facts = object_in(run_dir / "environment.json")
    if fingerprint := facts.get("data_fingerprint"):
        tags["data.fingerprint"] = str(fingerprint)
    for key, table in (object_in(run_dir / "data_report.json").get("tables") or {}).items():
        tags[f"table.{key}"] = f"{table.get('table')}@{table.get('version')}#{table.get('id')} {table.get('digest')}"
    return {RESERVED.sub("_", f"dstune_{name}"): value[:TAG_VALUE] for name, value in tags.items()}


def _prove(name: str, number: str, export: Path) -> None:
    """Load the registered model and the export in separate processes and compare their logits. Raises DstuneError if they
    differ."""
    import numpy as np

    with tempfile.TemporaryDirectory(prefix="dstune-") as scratch:
        loaded, direct = Path(scratch, "loaded.npy"), Path(scratch, "direct.npy")
        for place, out in ((f"models:/{name}/{number}", loaded), (str(export), direct)):
            words = [sys.executable, "-m", "dstune.lakehouse.load_registered", place, str(out)]
            try:
                done = subprocess.run(
                    words, env=child_environment(), capture_output=True, text=True, timeout=PROOF_SECONDS
                )
            except subprocess.TimeoutExpired:
                reason = f"{name} version {number} was not loaded back within {PROOF_SECONDS:.0f} s"
                raise DstuneError(f"{reason}; no alias was moved") from None
            if done.returncode:
                last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
                raise DstuneError(f"{name} version {number} cannot be loaded back: {last}; no alias was moved")
        if not np.array_equal(np.load(loaded), np.load(direct), equal_nan=True):
            raise DstuneError(f"{name} version {number} answers otherwise than the export {export}; no alias was moved")


def _move(client: Any, name: str, alias: str, number: str) -> str | None:
    """Point `alias` to the version. Returns the version that it pointed to before."""
    version_before = version_of_alias(client, name, alias)
    if version_before == number:
        return version_before
    if version_before is not None:
        client.set_registered_model_alias(name, alias + PREVIOUS, version_before)
    client.set_registered_model_alias(name, alias, number)
    return version_before


def version_of_alias(client: Any, name: str, alias: str) -> str | None:
    """Return the version that an alias points to; None if there is no such model or alias."""
    try:
        return str(client.get_model_version_by_alias(name, alias).version)
    except Exception as error:
        if getattr(error, "error_code", "") in ("INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST"):
            return None
        raise
