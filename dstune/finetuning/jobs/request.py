"""The body of `POST /v1/fine_tuning/jobs`, checked field by field."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dstune.finetuning.fields import checked_metadata, invalid, is_text, refuse_unknown
from dstune.finetuning.jobs import hyperparameters
from dstune.finetuning.jobs.configuration import PLAIN
from dstune.finetuning.jobs.hyperparameters import Value
from dstune.serve.errors import ApiError

MOST_SEED = 2_147_483_647
MOST_SUFFIX = 64
MOST_INTEGRATIONS = 5
MOST_TAGS = 50
UNBUILT = ("reinforcement",)
WANDB = ("project", "name", "entity", "tags")
FIELDS = (
    "model", "training_file", "validation_file", "method", "hyperparameters", "suffix", "seed", "integrations", "metadata",
)  # fmt: skip
_ELSEWHERE = {
    **{name: f"integrations.0.wandb.{name}" for name in WANDB},
    **{name: f"method.{name}" for name in hyperparameters.METHODS},
    "type": "method.type",
    "wandb": "integrations.0.wandb",
}
"""Where fields belong that stand beside those of a job by mistake."""


@dataclass(frozen=True)
class JobRequest:
    model: str
    training_file: str
    method: str
    hyperparameters: Mapping[str, Value]
    validation_file: str | None
    suffix: str | None
    seed: int
    integrations: list[dict[str, Any]] = field(default_factory=list)
    metadata: dict[str, str] | None = None


def read(body: Mapping[str, Any]) -> JobRequest:
    """Raises ApiError for the first field that is wrong or unknown."""
    refuse_unknown(body, FIELDS, elsewhere=_ELSEWHERE | _places_of(body.get("method")))
    method, found = _method(body)
    return JobRequest(
        model=_required(body, "model"),
        training_file=_required(body, "training_file"),
        method=method,
        hyperparameters=found,
        validation_file=_text(body, "validation_file", 128),
        suffix=_text(body, "suffix", MOST_SUFFIX),
        seed=_seed(body.get("seed")),
        integrations=_integrations(body.get("integrations")),
        metadata=checked_metadata(body.get("metadata")),
    )


def _places_of(method: Any) -> dict[str, str]:
    """Where the hyperparameters of a request's method stand, by their names."""
    kind = method.get("type") if isinstance(method, Mapping) else None
    named = hyperparameters.METHODS.get(kind, {}) if isinstance(kind, str) else {}
    return hyperparameters.PLACES | {name: f"method.{kind}.hyperparameters.{name}" for name in named}


def _required(body: Mapping[str, Any], name: str) -> str:
    if body.get(name) is None:
        message = f"Missing required parameter: '{name}'."
        raise ApiError(400, message, param=name, code="missing_required_parameter")
    found = _text(body, name, 512)
    assert found is not None
    return found


def _text(body: Mapping[str, Any], name: str, most: int) -> str | None:
    value = body.get(name)
    if value is None:
        return None
    if not is_text(value, most):
        raise invalid(name, f"a text of 1 to {most} characters")
    return value


def _seed(value: Any) -> int:
    if value is None:
        return secrets.randbelow(MOST_SEED + 1)
    whole = isinstance(value, int | float) and not isinstance(value, bool) and value == value // 1
    if not whole or not 0 <= value <= MOST_SEED:
        raise invalid("seed", f"a whole number from 0 to {MOST_SEED}")
    return int(value)


def _method(body: Mapping[str, Any]) -> tuple[str, dict[str, Value]]:
    """The method's name and its hyperparameters, which may come under their earlier name."""
    method, earlier = body.get("method"), body.get("hyperparameters")
    if method is None:
        return "supervised", hyperparameters.read("supervised", earlier, "hyperparameters")
    if not isinstance(method, Mapping):
        raise invalid("method", "an object with the key 'type'")
    kind = method.get("type")
    if kind in UNBUILT:
        message = f"The method '{kind}' is not supported by this server; it has {', '.join(hyperparameters.METHODS)}."
        raise ApiError(400, message, param="method.type", code="unsupported")
    if not isinstance(kind, str) or kind not in hyperparameters.METHODS:
        raise invalid("method.type", f"one of {', '.join(hyperparameters.METHODS)}")
    others = {name: value for name, value in method.items() if name not in hyperparameters.METHODS or value is not None}
    places = _places_of(method)
    refuse_unknown(others, ("type", kind), "method", {**places, "hyperparameters": f"method.{kind}.hyperparameters"})
    own = method.get(kind)
    if own is not None and not isinstance(own, Mapping):
        raise invalid(f"method.{kind}", "an object with the key 'hyperparameters'")
    refuse_unknown(own or {}, ("hyperparameters",), f"method.{kind}", places)
    found = hyperparameters.read(kind, (own or {}).get("hyperparameters"), f"method.{kind}.hyperparameters")
    if earlier is not None and earlier != {}:
        before = hyperparameters.read("supervised", earlier, "hyperparameters")
        if kind != "supervised" or before != found:
            message = (
                "'hyperparameters' is an earlier name of 'method.supervised.hyperparameters', and says something else."
            )
            raise ApiError(400, message, param="hyperparameters", code="invalid_value")
    return kind, found


def _integrations(given: Any) -> list[dict[str, Any]]:
    if given is None:
        return []
    if not isinstance(given, list) or len(given) > MOST_INTEGRATIONS:
        raise invalid("integrations", f"a list of at most {MOST_INTEGRATIONS}")
    found = [_integration(one, f"integrations.{place}") for place, one in enumerate(given)]
    if len(found) > 1:
        raise invalid("integrations", "a list of one: a run is sent to W&B once")
    return found


def _integration(one: Any, where: str) -> dict[str, Any]:
    if not isinstance(one, Mapping) or one.get("type") != "wandb":
        raise invalid(f"{where}.type", "'wandb'")
    refuse_unknown(one, ("type", "wandb"), where, {name: f"{where}.wandb.{name}" for name in WANDB})
    given = one.get("wandb")
    if not isinstance(given, Mapping):
        raise invalid(f"{where}.wandb", "an object with the key 'project'")
    refuse_unknown(given, WANDB, f"{where}.wandb")
    if given.get("project") is None:
        place = f"{where}.wandb.project"
        raise ApiError(400, f"Missing required parameter: '{place}'.", param=place, code="missing_required_parameter")
    made: dict[str, Any] = {}
    for name in ("project", "name", "entity"):
        value = given.get(name)
        if value is not None:
            made[name] = _plain(value, f"{where}.wandb.{name}")
    tags = given.get("tags")
    if tags is not None:
        if not isinstance(tags, list) or len(tags) > MOST_TAGS:
            raise invalid(f"{where}.wandb.tags", f"a list of at most {MOST_TAGS}")
        made["tags"] = [_plain(tag, f"{where}.wandb.tags", most=64) for tag in tags]
    return {"type": "wandb", "wandb": made}


def _plain(value: Any, param: str, most: int = 128) -> str:
    """Text that goes into a configuration: nothing in it may be read as a reference."""
    if not isinstance(value, str) or len(value) > most or not PLAIN.fullmatch(value) or value != value.strip():
        raise invalid(param, f"1 to {most} letters, digits, spaces and . _ : @ / + = -")
    return value
