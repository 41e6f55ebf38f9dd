"""The body of `POST /v1/fine_tuning/jobs`."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from dstune.finetuning.fields import Body, IdText, Metadata, read_body
from dstune.finetuning.graders.grader import check_grader_of_job
from dstune.finetuning.jobs import hyperparameters
from dstune.finetuning.jobs.configuration import PLAIN
from dstune.finetuning.jobs.hyperparameters import DPO, REINFORCEMENT, SUPERVISED, Hyperparameter, Value
from dstune.finetuning.jobs.presets import Preset
from dstune.serve.errors import ApiError
from dstune.serve.validation import Expected, Whole, wrong

MOST_SEED = 2_147_483_647
MOST_SUFFIX = 64
MOST_TAGS = 50


def _safe_text(most: int) -> Any:
    """Return a type of text that is safe in a configuration: it cannot contain an interpolation."""

    def check(value: str) -> str:
        if len(value) > most or not PLAIN.fullmatch(value) or value != value.strip():
            raise wrong(f"must be 1 to {most} letters, digits, spaces and . _ : @ / + = -")
        return value

    return AfterValidator(check)


Word = Annotated[str, _safe_text(128)]


Tags = Annotated[
    list[Annotated[str, _safe_text(64)]],
    Field(max_length=MOST_TAGS),
    Expected(f"must be at most {MOST_TAGS} texts of 1 to 64 letters, digits, spaces and . _ : @ / + = -"),
]


class Wandb(Body):
    project: Word
    name: Word | None = None
    entity: Word | None = None
    tags: Tags | None = None


class Integration(Body):
    type: Annotated[Literal["wandb"], Expected("must be 'wandb'")]
    wandb: Wandb


def _whole(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


class Supervised(Body):
    """Hyperparameters; a field that is absent or null is "auto"."""

    n_epochs: Annotated[Any, Hyperparameter(SUPERVISED["n_epochs"])] = None
    batch_size: Annotated[Any, Hyperparameter(SUPERVISED["batch_size"])] = None
    learning_rate_multiplier: Annotated[Any, Hyperparameter(SUPERVISED["learning_rate_multiplier"])] = None


class Dpo(Supervised):
    beta: Annotated[Any, Hyperparameter(DPO["beta"])] = None


class Reinforcement(Supervised):
    compute_multiplier: Annotated[Any, Hyperparameter(REINFORCEMENT["compute_multiplier"])] = None
    eval_interval: Annotated[Any, Hyperparameter(REINFORCEMENT["eval_interval"])] = None
    eval_samples: Annotated[Any, Hyperparameter(REINFORCEMENT["eval_samples"])] = None
    reasoning_effort: Annotated[Literal["default"], Expected("must be 'default': models here have no other")] | None = (
        None
    )


class SupervisedOptions(Body):
    hyperparameters: Supervised | None = None


class DpoOptions(Body):
    hyperparameters: Dpo | None = None


class ReinforcementOptions(Body):
    grader: dict[str, Any]
    hyperparameters: Reinforcement | None = None


class Method(Body):
    type: Annotated[
        Literal["supervised", "dpo", "reinforcement"], Expected("must be one of supervised, dpo, reinforcement")
    ]
    supervised: SupervisedOptions | None = None
    dpo: DpoOptions | None = None
    reinforcement: ReinforcementOptions | None = None

    @classmethod
    def accepted(cls, value: Mapping[str, Any]) -> set[str]:
        """Return the accepted field names; the options of other methods must be null."""
        return {"type", str(value.get("type")), *(name for name in hyperparameters.METHODS if value.get(name) is None)}


class Creation(Body):
    model: Annotated[str, IdText(512)]
    training_file: Annotated[str, IdText(512)]
    validation_file: Annotated[str, IdText(128)] | None = None
    method: Method | None = None
    hyperparameters: Supervised | None = None
    """An earlier name of `method.supervised.hyperparameters`."""
    suffix: Annotated[str, IdText(MOST_SUFFIX)] | None = None
    seed: Annotated[int, Whole(0, MOST_SEED), BeforeValidator(_whole)] | None = None
    integrations: Annotated[list[Integration], Field(max_length=1)] | None = None
    """At most one: a run is logged to W&B once."""
    metadata: Metadata | None = None


WANDB = tuple(Wandb.model_fields)
_ELSEWHERE = {
    **{name: f"integrations.0.wandb.{name}" for name in WANDB},
    **{name: f"method.{name}" for name in hyperparameters.METHODS},
    "type": "method.type",
    "wandb": "integrations.0.wandb",
}
"""The right place of fields that clients put at the top level by mistake."""


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
    grader: dict[str, Any] | None = None
    """For `reinforcement`; `check_grader_of` validates it."""


def read(body: Mapping[str, Any]) -> JobRequest:
    """Parse the body of a request. Raises ApiError for the first field that is wrong or unknown."""
    creation = read_body(Creation, body, _ELSEWHERE | _places_of(body.get("method")))
    method, values = _hyperparameters(creation)
    return JobRequest(
        model=creation.model,
        training_file=creation.training_file,
        method=method,
        hyperparameters=values,
        validation_file=creation.validation_file,
        suffix=creation.suffix,
        seed=secrets.randbelow(MOST_SEED + 1) if creation.seed is None else creation.seed,
        integrations=[integration.model_dump(exclude_none=True) for integration in creation.integrations or ()],
        metadata=creation.metadata,
        grader=_grader(creation),
    )


def _grader(creation: Creation) -> dict[str, Any] | None:
    """Return the request's grader; None for other methods. Raises ApiError."""
    if creation.method is None or creation.method.type != "reinforcement":
        return None
    if creation.method.reinforcement is None:
        message = "Missing required parameter: 'method.reinforcement.grader'."
        raise ApiError(400, message, param="method.reinforcement.grader", code="missing_required_parameter")
    return creation.method.reinforcement.grader


def check_grader_of(job_request: JobRequest, preset: Preset) -> None:
    """Check the grader. This is separate from `read` because it may take long: Python is parsed, if `preset` allows it. Raises
    ApiError."""
    if job_request.grader is not None:
        absent = {} if preset.python_graders else {"python": f"jobs of {preset.name!r} run no code of clients"}
        check_grader_of_job(job_request.grader, "method.reinforcement.grader", absent)


def _places_of(method: Any) -> dict[str, str]:
    """Return the places of the method's hyperparameters in the request, by name."""
    kind = method.get("type") if isinstance(method, Mapping) else None
    names = hyperparameters.METHODS.get(kind, {}) if isinstance(kind, str) else {}
    places = {name: f"method.{kind}.hyperparameters.{name}" for name in names}
    if names:
        places["hyperparameters"] = f"method.{kind}.hyperparameters"
    return hyperparameters.PLACES | places


def _hyperparameters(creation: Creation) -> tuple[str, dict[str, Value]]:
    """Return the method's name and its hyperparameters, which may also be given under their earlier name. Raises ApiError if both
    are given and differ."""
    earlier = _values(creation.hyperparameters or Supervised())
    if creation.method is None:
        return "supervised", earlier
    kind = creation.method.type
    options = getattr(creation.method, kind)
    absent = {"supervised": Supervised, "dpo": Dpo, "reinforcement": Reinforcement}[kind]()
    values = _values((options.hyperparameters if options else None) or absent)
    if (
        creation.hyperparameters
        and creation.hyperparameters.model_fields_set
        and (kind != "supervised" or earlier != values)
    ):
        message = (
            "'hyperparameters' is an earlier name of 'method.supervised.hyperparameters', and says something else."
        )
        raise ApiError(400, message, param="hyperparameters", code="invalid_value")
    return kind, values


def _values(options: Supervised) -> dict[str, Value]:
    values = {name: hyperparameters.AUTO if value is None else value for name, value in options}
    values.pop("reasoning_effort", None)  # it can only be 'default'
    return values
