"""Translates what a DeepSpeed configuration says of training: batch, clipping, precision, optimizer, schedule.

A key that the file leaves out has DeepSpeed's default, which is not always dstune's. A section `optimizer` that the file leaves out
is the script's business in DeepSpeed, so dstune's own group decides. So it does for `auto`. Without `scheduler`, a rate that the
file sets stays the same, as in DeepSpeed; a rate that it leaves to the script has dstune's own schedule.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dstune.config.convert import format_value
from dstune.config.deepspeed_values import AUTO, Content, Value, is_number, section_of, whole_number
from dstune.config.names import classes_of
from dstune.core.errors import Problem


def read_training(raw: Mapping[str, Any], content: Content, where: str) -> None:
    """Add the values of a configuration that decide what a step computes. where: the file's name, for messages."""
    _read_batch(raw, content)
    if "gradient_clipping" not in raw:
        note = "(since 0.19.3; earlier versions clipped nothing)"
        content.values.append(Value("trainer.grad_clip", 1.0, "gradient_clipping", implied=True, note=note))
    _read_precision(raw, content, where)
    _read_optimizer(raw.get("optimizer"), content, where)
    _read_scheduler(raw.get("scheduler"), content, where)


# ---- batch ----


def _read_batch(raw: Mapping[str, Any], content: Content) -> None:
    """Decide which of the three sizes follows from the two others, as DeepSpeed does. A size that is `auto` is dstune's."""
    batch, micro, steps = (
        raw.get(key) for key in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    )
    has_sizes = batch not in (None, AUTO) or micro not in (None, AUTO)
    if steps not in (None, AUTO):
        content.accumulation = Value("trainer.global_batch_size", whole_number(steps), "gradient_accumulation_steps")
    elif steps is None and has_sizes and (batch is None or micro is None):
        content.accumulation = Value("trainer.global_batch_size", 1, "gradient_accumulation_steps", True)
    content.derives_micro_batch = content.accumulation is not None and micro is None and batch not in (None, AUTO)


# ---- precision ----

TRUE, FALSE = (1, "1", "on", "t", "true", "y", "yes"), (0, "0", "off", "f", "false", "n", "no")


def switch(value: Any) -> bool | None:
    """Return what DeepSpeed's configuration takes for `enabled`, where a text such as "false" is a truth value; else None."""
    word = value.lower() if isinstance(value, str) else value
    if not isinstance(word, (bool, int, float, str)):
        return None
    return True if word in TRUE else False if word in FALSE else None


def _read_precision(raw: Mapping[str, Any], content: Content, where: str) -> None:
    """Add the `trainer.precision` that the sections `bf16` and `fp16` mean. Without one that is enabled or `auto`, it is fp32."""
    label_by_name = {"bf16": "bfloat16" if raw.get("bf16") is None else "bf16", "fp16": "fp16"}
    states: dict[str, Any] = {}
    for name, label in label_by_name.items():
        settings = section_of(raw, label)
        enabled = settings if settings == AUTO else settings.get("enabled")
        states[name] = enabled if enabled in (None, AUTO) else switch(enabled)
        if enabled is not None and states[name] is None:
            reason = "expected true or false"
            fix = '"enabled": true, or false'
            content.problems.append(Problem(f"{label}.enabled in {where}", reason, fix, format_value(enabled)))
            return
    key = "trainer.precision"
    enabled_names = [name for name, state in states.items() if state is True]
    if len(enabled_names) == 2:
        content.problems.append(Problem(f"fp16.enabled in {where}", "bf16 is enabled too", "disable one of them"))
    elif enabled_names:
        content.values.append(Value(key, enabled_names[0], f"{enabled_names[0]}.enabled"))
    elif states["bf16"] == AUTO:
        if states["fp16"] is False:
            content.values.append(Value(key, "fp16", "fp16.enabled", excluded=True))
    elif states["bf16"] is False or states["fp16"] is False:
        content.values.append(Value(key, "fp32", "bf16.enabled" if states["bf16"] is False else "fp16.enabled"))
    elif states["fp16"] is None:
        content.values.append(Value(key, "fp32", "bf16 and fp16", implied=True))
    if states["fp16"] in (True, AUTO) and isinstance(raw.get("fp16"), Mapping):
        # dstune's own first loss scale is lower.
        content.settings.setdefault("fp16", {}).setdefault("initial_scale_power", 16)


# ---- optimizer ----

OPTIMIZERS = {"adamw": "adamw", "adam": "adamw", "lion": "lion", "muon": "muon"}
"""DeepSpeed's names, in any case. Its `Adam` decays weights as AdamW does, unless `adam_w_mode` is false."""
DEFAULTS: dict[str, dict[str, Any]] = {
    "adamw": {"lr": 1e-3, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.0},
    "lion": {"lr": 1e-3, "betas": [0.9, 0.999], "weight_decay": 0.0},
    "muon": {"momentum": 0.95, "betas": [0.9, 0.95], "eps": 1e-10, "weight_decay": 0.0},
    "sgd": {"lr": 1e-3, "momentum": 0.0, "weight_decay": 0.0},
}
"""DeepSpeed's defaults of the parameters that dstune has a key for. Their keys are all that an optimizer has."""
RATES_OF_MUON = ("lr", "muon_lr", "adam_lr")
SAME_RESULT = (
    "torch_adam",
    "fused",
    "foreach",
    "set_grad_none",
    "capturable",
    "differentiable",
    "maximize",
    "ns_method",
)
"""Parameters that decide how an update is computed, if they are not in `ONLY`."""
ONLY: dict[str, Any] = {
    "adam_w_mode": True,
    "bias_correction": True,
    "amsgrad": False,
    "nesterov": False,
    "dampening": 0,
    "maximize": False,
    "fp32_optimizer_states": True,
    "per_head_muon": False,
}
"""Parameters that have to be what dstune's optimizers do anyway."""


BUILT_IN = ("adamw", "adamw_8bit", "lion", "muon", "sgd")
"""dstune's optimizers; DeepSpeed's names for them are above."""


def _read_optimizer(settings: Any, content: Content, where: str) -> None:
    if not isinstance(settings, Mapping):
        return
    params = _params("optimizer", settings, content, where, ("type", "params", "legacy_fusion"))
    kind = settings.get("type")
    of_plugins = {name.lower(): name for name in classes_of("optimizer") if name not in BUILT_IN}
    choice = "sgd" if kind == "SGD" else OPTIMIZERS.get(str(kind).lower()) or of_plugins.get(str(kind).lower())
    if _has_no_type("optimizer", kind, params, content, where):
        return
    if choice is None:
        reason = f"dstune has no such optimizer (there are {', '.join(sorted(classes_of('optimizer')))})"
        fix = '"type": "AdamW"'
        content.problems.append(Problem(f"optimizer.type in {where}", reason, fix, str(kind)))
        return
    content.values.append(Value("optimizer", choice, "optimizer.type"))
    if choice not in DEFAULTS:  # a plugin's own keys, which composing checks
        settled = {name: value for name, value in params.items() if value != AUTO}
        content.values += [
            Value(f"optimizer.{name}", value, f"optimizer.params.{name}") for name, value in settled.items()
        ]
        return
    defaults, whole_section = dict(DEFAULTS[choice]), settings.get("params") == AUTO
    if choice == "adamw" and params.get("torch_adam"):
        defaults["weight_decay"] = 0.01  # torch's AdamW; DeepSpeed's own decays nothing by default
    for name, default in defaults.items():
        source, value = f"optimizer.params.{name}", params.get(name)
        if name not in params and not whole_section:
            content.values.append(Value(f"optimizer.{name}", default, source, True))
        elif name in params and value != AUTO:
            content.values.append(Value(f"optimizer.{name}", value, source))
    if choice == "muon" and not whole_section:
        params = _refuse_rates_of_muon(params, content, where)
    is_adamw = str(kind).lower() == "adamw"  # for which DeepSpeed ignores `adam_w_mode`
    for name, value in params.items():
        is_same = name in SAME_RESULT and name not in ONLY
        if name in defaults or value == AUTO or is_same or (name == "adam_w_mode" and is_adamw):
            continue
        if name not in ONLY or value != ONLY[name]:
            reason = "dstune's optimizers do not do this" if name in ONLY else f"optimizer={choice} has no such key"
            fix = f"remove it, or write {format_value(ONLY[name])}" if name in ONLY else "remove it"
            content.problems.append(Problem(f"optimizer.params.{name} in {where}", reason, fix, format_value(value)))


def _refuse_rates_of_muon(params: Mapping[str, Any], content: Content, where: str) -> Mapping[str, Any]:
    """Add a problem for each rate, also for DeepSpeed's default. Returns the other parameters.

    With ZeRO, DeepSpeed orthogonalizes before it clips, by a norm over updates of matrices and gradients of the rest. So even the
    size of the loss changes its updates of matrices.
    """
    rates = {name: params[name] for name in RATES_OF_MUON if name in params}
    reason = (
        "no rate of dstune's Muon trains the same: DeepSpeed scales an update by the shape of its matrix, dstune to the size of"
        " AdamW's, and at ZeRO 1 to 3 DeepSpeed clips updates instead of gradients"
    )
    fix = 'write "lr": "auto" alone, which leaves the rate to optimizer.lr: rates for AdamW fit dstune\'s Muon'
    for name, value in (rates or {"lr": 0.02}).items():
        if value != AUTO:
            content.problems.append(Problem(f"optimizer.params.{name} in {where}", reason, fix, format_value(value)))
    return {name: value for name, value in params.items() if name not in rates}


def _params(
    name: str, settings: Mapping[str, Any], content: Content, where: str, known: tuple[str, ...]
) -> Mapping[str, Any]:
    for key, value in settings.items():
        if key not in known and not key.startswith("_"):
            reason, fix = "DeepSpeed ignores this key", f"remove it, or write it into {name}.params"
            content.problems.append(Problem(f"{name}.{key} in {where}", reason, fix, format_value(value)))
    params = settings.get("params")
    if isinstance(params, Mapping):
        return {key: value for key, value in params.items() if not key.startswith("_")}
    if params not in (None, AUTO):
        reason = "this is a section: expected an object"
        content.problems.append(
            Problem(f"{name}.params in {where}", reason, 'such as {"lr": 1e-5}', format_value(params))
        )
    return {}


def _has_no_type(name: str, kind: Any, params: Mapping[str, Any], content: Content, where: str) -> bool:
    """Return whether the section chooses nothing, so that dstune's own group decides. Parameters then are a problem: DeepSpeed
    ignores them."""
    if kind not in (None, AUTO):
        return False
    if any(value != AUTO for value in params.values()):
        reason = f"without a type, DeepSpeed ignores {name}.params"
        fix = {"optimizer": '"type": "AdamW"', "scheduler": '"type": "WarmupDecayLR"'}[name]
        content.problems.append(Problem(f"{name}.type in {where}", reason, f"add {fix}, or remove the section"))
    return True


# ---- schedule ----

WARMUP = {"warmup_num_steps": "schedule.warmup_steps", "warmup_type": "schedule.warmup_type"}
RATES = {"warmup_min_lr": "", "warmup_max_lr": "optimizer.lr"}
LENGTH = {"total_num_steps": "schedule.total_steps"}
RATIOS = {"warmup_min_ratio": "schedule.start_lr_ratio", "cos_min_ratio": "schedule.min_lr_ratio"}
SCHEDULERS: dict[str, tuple[str, dict[str, str]]] = {
    "WarmupLR": ("none", WARMUP | RATES),
    "WarmupDecayLR": ("linear", WARMUP | RATES | LENGTH),
    "WarmupCosineLR": ("cosine", WARMUP | LENGTH | RATIOS),
}
"""By DeepSpeed's name: the decay, and the key for each parameter."""
SCHEDULE_DEFAULTS = {
    "warmup_num_steps": 1000,
    "warmup_type": "log",
    "warmup_min_ratio": 0.0,
    "cos_min_ratio": 0.0001,
}


def _read_scheduler(settings: Any, content: Content, where: str) -> None:
    if not isinstance(settings, Mapping):
        _keep_rate(content)
        return
    params = _params("scheduler", settings, content, where, ("type", "params"))
    kind = settings.get("type")
    if _has_no_type("scheduler", kind, params, content, where):
        _keep_rate(content)
        return
    if kind not in SCHEDULERS:
        reason = f"dstune has no such schedule; {', '.join(SCHEDULERS)} have one"
        fix = '"type": "WarmupDecayLR", or remove the section and give schedule=CHOICE'
        content.problems.append(Problem(f"scheduler.type in {where}", reason, fix, str(kind)))
        return
    decay, key_by_name = SCHEDULERS[kind]
    content.values.append(Value("schedule", "deepspeed", "scheduler.type"))
    content.values.append(Value("schedule.decay", decay, "scheduler.type"))
    whole_section = settings.get("params") == AUTO
    for name, key in key_by_name.items():
        value, source = params.get(name), f"scheduler.params.{name}"
        if name == "warmup_type" and value == AUTO:
            value = "log"  # what DeepSpeed makes of every word that it does not know
        if name not in params and not whole_section:
            _put_default(kind, name, key, content, where)
        elif name not in params or value == AUTO:
            continue
        elif name == "warmup_min_lr":
            content.start_rate = Value("schedule.start_lr_ratio", value, source)
        elif problem := _wrong(name, value):
            content.problems.append(Problem(f"{source} in {where}", *problem, format_value(value)))
        else:
            if name == "warmup_max_lr":
                content.drop(key)  # the schedule sets the rate of every step, whatever the optimizer began with
            content.values.append(Value(key, whole_number(value), source))
    for name, value in params.items():
        if name not in key_by_name and (name, value) != ("last_batch_iteration", -1):
            reason = (
                f"{kind} of DeepSpeed has no such parameter"
                if name != "last_batch_iteration"
                else "runs begin at step 1"
            )
            content.problems.append(
                Problem(f"scheduler.params.{name} in {where}", reason, "remove it", format_value(value))
            )


def _keep_rate(content: Content) -> None:
    """Keep the rate that the file or DeepSpeed's default sets, since there is no schedule. One that it leaves to the script has
    dstune's."""
    if any(value.key == "optimizer.lr" for value in content.values):
        content.values.append(Value("schedule", "constant", "scheduler", implied=True, note="(one rate for all steps)"))
    else:
        content.leaves_schedule = True


def _put_default(kind: str, name: str, key: str, content: Content, where: str) -> None:
    """Add DeepSpeed's default of a parameter of a scheduler that the file leaves out."""
    source = f"scheduler.params.{name}"
    if name in SCHEDULE_DEFAULTS:
        content.values.append(Value(key, SCHEDULE_DEFAULTS[name], source, True))
    elif name == "total_num_steps":
        reason, fix = f"{kind} of DeepSpeed needs it", 'write a number of steps, or "auto" for the length of the run'
        content.problems.append(Problem(f"{source} in {where}", reason, fix))
    elif name == "warmup_max_lr" and kind == "WarmupDecayLR":
        content.drop(key)
        note = "which sets the rate of every step, whatever optimizer.params.lr is"
        content.values.append(Value(key, 0.001, source, implied=True, note=note))


def _wrong(name: str, value: Any) -> tuple[str, str] | None:
    """Return what is wrong with the value of a parameter, as (reason, fix)."""
    if name == "warmup_type":
        return None if value in ("log", "linear") else ("expected log or linear", 'write "linear", or "log"')
    if name == "warmup_num_steps" and is_number(value) and value < 1:
        return "DeepSpeed needs at least one step of warm-up", 'write 1, or "auto" and schedule.warmup_steps=0'
    if name == "warmup_max_lr" and not is_number(value):
        return "expected a number: dstune's groups of parameters have one rate", "write one number"
    return None
