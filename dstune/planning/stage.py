"""`zero.stage=auto`: chooses the stage of a run with the plan for its machines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from dstune.config.parallel_rules import ranks_problem
from dstune.config.precision import FIRST_BF16, automatic
from dstune.config.requirements import requirement_problem
from dstune.config.schema import Automatic, Precision, RunConfig
from dstune.config.stored_formats import stored_format_problem
from dstune.config.validate import TILED, allowed_stages, at_stage, tiles_problem
from dstune.core.errors import UserError
from dstune.planning import architecture, host, source
from dstune.planning.further import held_models
from dstune.planning.hardware import Cluster, Device
from dstune.planning.plan import Choice, cheapest_stage
from dstune.planning.setup import Setup, head_of, labels_of, setup
from dstune.planning.time import Speed, speed_of
from dstune.planning.vision import Images, tower_of, trained_part
from dstune.protocols import method_of, parallelism_of


def is_open(config: RunConfig) -> bool:
    """Return whether `zero.stage` is still `auto`."""
    return config.zero.stage is Automatic.auto


def choose_stage(
    config: RunConfig, cluster: Cluster, measured: dict[int, Speed] | None = None
) -> tuple[RunConfig, str]:
    """Return `config` with the stage that the plan chooses for `cluster`, and the reason. If the planner does not know the model,
    the stage is the highest allowed one, which needs the least memory. measured: speeds of a calibration by the bytes of a
    weight."""
    try:
        return choose_planned_stage(config, cluster, measured)
    except UserError:
        return at_stage(config, max(allowed_stages(config))), (
            "the plan does not know this model, and of the stages that are allowed this takes the least memory"
        )


def choose_planned_stage(
    config: RunConfig, cluster: Cluster, measured: dict[int, Speed] | None = None, images: Images | None = None
) -> tuple[RunConfig, str]:
    """Return `config` with the stage that the plan chooses for `cluster`, and the reason.

    measured: as for `choose_stage`. images: as for `setup_on`. Raises UserError if the planner does not know the model.
    """
    stages = allowed_stages(config)
    if len(stages) == 1:
        return at_stage(config, stages[0]), "other settings allow no other stage"
    configured, _, _ = setup_on(at_stage(config, stages[-1]), cluster, images)
    best, compared = cheapest_stage(configured, cluster, all_speeds(cluster, measured), stages)
    chosen = at_stage(config, best.setup.stage)
    if best.setup.copy_ranks > 1:
        chosen = replace(chosen, zero=replace(chosen.zero, hpz=True))
    return chosen, _reason(best, compared, cluster)


def _reason(best: Choice, compared: Sequence[Choice], cluster: Cluster) -> str:
    takes = f"{best.memory_gib:.1f} of {cluster.device.memory_gib:.1f} GiB a rank"
    if not best.fits:
        return f"none fits by the plan, and this takes the least memory ({takes})"
    fitting = [choice.partitioning.removeprefix("stage") for choice in compared if choice.fits]
    if len(fitting) == 1:
        return f"the only stage that fits by the plan ({takes})"
    fit = f"of the stages that fit by the plan, which are {', '.join(fitting)}"
    if best.time.seconds > min(choice.time.seconds for choice in compared if choice.fits):
        return f"about as fast as any {fit}, and with more room ({takes})"
    return f"the fastest {fit} ({takes})"


def setup_on(
    config: RunConfig, cluster: Cluster, images: Images | None = None
) -> tuple[Setup, Precision, architecture.Architecture]:
    """Return the numbers that memory and time of a run depend on, its precision, and the model's architecture before ranks share
    its weights. images: those of a row; None if rows have none.

    Raises UserError if the model's architecture is not known, or cannot be trained with this configuration.
    """
    values: dict[str, Any] = source.config_json(config.model)
    whole = source.whole_config_json(config.model) | config.model.config_overrides
    if (problem := requirement_problem(whole, config.model.path)) is not None:
        raise UserError(problem)
    if (problem := stored_format_problem(whole, config.model.path, method_of(config.method))) is not None:
        raise UserError(problem)
    model = architecture.architecture_or_count(values, whole, head_of(config), labels_of(config))
    parallel = parallelism_of(config.parallel)
    problems = parallel.architecture_problems(model, architecture.DEFAULTS.get(model.kind, {}) | values)
    if problem := ranks_problem(cluster.ranks, parallel.size):
        problems.append(problem)
    if problems:
        raise UserError(problems)
    if config.trainer.mlp_tiles > 1 and not any(TILED[0] in tensor.name for tensor in model.tensors):
        raise UserError(tiles_problem(model.kind, config.trainer.mlp_tiles))
    on_gpu = cluster.device.gpu
    precision = resolved_precision(config, cluster.device)
    planned_setup = setup(
        config,
        model,
        ranks=cluster.ranks,
        ranks_per_node=cluster.per_node,
        on_gpu=on_gpu,
        precision=precision,
        values=values,
    )
    held, _ = held_models(config)
    planned_setup = replace(planned_setup, unreached=source.unreached_weights(config.model, model), held=held)
    return _with_tower(planned_setup, config, whole, images), precision, model


def _with_tower(
    planned_setup: Setup, config: RunConfig, model_config: Mapping[str, Any], images: Images | None
) -> Setup:
    """Return the setup with the model's vision tower and, if the tower is trained, its trained weights."""
    tower = tower_of(model_config)
    if tower is None:
        return planned_setup
    if images is not None and config.data.packing:  # a packed row holds as many images as fit
        images = replace(images, in_row=max(images.in_row, planned_setup.length // images.tokens))
    if planned_setup.unreached and not any(name.endswith("audio_config") for name in model_config):
        tower = replace(tower, weights=planned_setup.unreached)  # exact if the architecture was counted
    tower = replace(tower, learns=config.model.train_vision, images=images)
    if not tower.learns:
        return replace(planned_setup, tower=tower)
    rank = getattr(config.method, "rank", 0) if planned_setup.adapter else 0
    trained = (*planned_setup.trained, trained_part(tower, adapter_rank=rank))
    unreached = planned_setup.unreached if planned_setup.adapter else max(0, planned_setup.unreached - tower.weights)
    return replace(planned_setup, tower=tower, trained=trained, unreached=unreached)


def all_speeds(cluster: Cluster, measured: dict[int, Speed] | None) -> dict[int, Speed]:
    """Return speeds by the bytes of a weight: measured ones if there are any, otherwise those of the hardware table."""
    return {size: speed_of(cluster, size) for size in (2, 4)} | (measured or {})


def resolved_precision(config: RunConfig, device: Device) -> Precision:
    """Return the precision in which ranks will compute on `device`; never `auto`."""
    requested = config.trainer.precision
    if requested is not Precision.auto:
        return requested
    capability = device.capability
    # A GPU of unknown capability is assumed to compute in bf16.
    fast = capability is None or capability >= FIRST_BF16 if device.gpu else host.fast_bf16()
    return automatic(config, fast_bf16=fast, capability=capability)
