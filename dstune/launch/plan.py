"""The verb `plan`: memory of a rank and time of a step for every ZeRO choice, before anything is started."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dstune.config.compose import compose
from dstune.config.flags import hydra_flags, show
from dstune.config.overrides import key_of
from dstune.config.run_file import read_run
from dstune.config.run_overrides import apply_overrides
from dstune.config.schema import Automatic, Precision, RunConfig, Selective
from dstune.config.stored_formats import describe_stored_format
from dstune.config.validate import find_problems
from dstune.core.arguments import is_path
from dstune.core.errors import EXIT_DONE, Problem, UserError
from dstune.launch import machine, rundir
from dstune.launch.calibrate import calibrate
from dstune.launch.commands import NO_TELEMETRY, OFFLINE
from dstune.launch.console import Console
from dstune.launch.plan_images import images_in_text, images_of, parse_images
from dstune.planning import hardware
from dstune.planning.calibration import speeds
from dstune.planning.fillers import IDLE, fillers, shares
from dstune.planning.further import uncounted_models
from dstune.planning.hardware import GIB, NUMBERS, Cluster
from dstune.planning.plan import SAME_SPEED, Choice, Plan, as_word, effort, plan
from dstune.planning.setup import Setup
from dstune.planning.source import whole_config_json
from dstune.planning.stage import all_speeds, choose_planned_stage, is_open, setup_on
from dstune.planning.time import Speed
from dstune.planning.vision import Images
from dstune.protocols import METHODS, launcher_of, method_of, task_of

if TYPE_CHECKING:
    from dstune.data.chat.factor import Growth

MOST_NODES = 1_000_000
"""More make numbers that no float holds."""

HELP = """\
usage: dstune plan [RUN] [key=value ...] [hardware=8xH100-80G] [nodes=4] [price=2.5] [--json]

Memory of a rank and time of a step for every ZeRO choice, with a recommendation; needs neither GPU nor weights.

  hardware=NxNAME     N devices in a node: A100-40G, A100-80G, H100, H200, B200, L40S, RTX4090, MI300X, CPU, or 24G for
                      any device of 24 GB; this machine when not given
  hardware.KEY=VALUE  own numbers: memory_gib, tflops (bf16), bandwidth, link, network (GB/s), host_gib (of a node)
  nodes=N             nodes of that kind; those of launch.nodes or launch.hostfile when not given
  --calibrate         measure this machine with real ranks first, in about half a minute; later plans use it
  images=NxWxH        N images of W x H pixels in each row (or WxH: one); those of the rows when not given
  price=X             what an hour of one device costs you, in your currency
  key=value           as for `dstune train`: model=llama3_8b method=lora data.max_length=4096 ...

With the PATH of a run, its configuration is planned.
"""


@dataclass(frozen=True)
class Arguments:
    """The arguments of `plan` itself; all others are Hydra's."""

    hardware: str | None
    numbers: dict[str, float]
    nodes: int | None
    """As given; else as many as the launch names."""
    price: float | None
    images: tuple[int, int, int] | None
    """Images of a row, and the pixels of each in a row and a column."""
    json: bool
    calibrate: bool
    rest: list[str]


def main(argv: list[str]) -> int:
    """Run the verb. Raises UserError; returns the exit code."""
    if {"--help", "-h"} & set(argv):
        print(HELP, end="")
        return EXIT_DONE
    arguments = parse(argv)
    flags = hydra_flags(arguments.rest[1:] if arguments.rest and is_path(arguments.rest[0]) else arguments.rest)
    if flags.shows:
        return show(flags)
    config = configuration(arguments)
    if arguments.calibrate:
        if arguments.hardware is not None or arguments.numbers:
            raise UserError(
                Problem("--calibrate", "this machine is measured, so none can be named", "leave hardware= out")
            )
        calibrate(config, Console(sys.stderr if arguments.json else sys.stdout))
    estimate = plan_of(config, arguments, images_of(config, arguments.images))
    estimate = replace(estimate, growth=growth(config), others=other_methods(config, estimate.cluster, estimate))
    if arguments.json:
        print(json.dumps(as_json(estimate, arguments.price, config), indent=1))
    else:
        from_run = bool(arguments.rest) and is_path(arguments.rest[0])
        print(as_text(estimate, arguments.price, config, None if from_run else arguments.rest))
    return EXIT_DONE


def configuration(arguments: Arguments) -> RunConfig:
    """Return the configuration to plan. Raises UserError for configurations that `train` refuses, too."""
    words, run = list(arguments.rest), None
    if words and is_path(words[0]):
        run = rundir.run_directory(Path(words.pop(0)))
    flags = hydra_flags(words)
    try:
        if run is None:
            config = compose(flags.overrides, flags.config_dirs).config
        else:
            config = apply_overrides(read_run(run / rundir.RUN_FILE, flags.overrides).config, flags.overrides)
    except UserError as error:  # all problems at once, and among them what only a training needs
        raise UserError(_of_plan(error.problems) or error.problems) from None
    refuse(config)
    return config


def refuse(config: RunConfig) -> None:
    """Raise UserError for a configuration that `train` refuses, too, except for missing rows, which a plan does not need."""
    if problems := _of_plan(find_problems(config)):
        raise UserError(problems)


def _of_plan(problems: Iterable[Problem]) -> list[Problem]:
    return [problem for problem in problems if not problem.where.startswith("data.train")]


def parse(argv: list[str]) -> Arguments:
    """Return the arguments of the command line, checked. Raises UserError: a number that is none, an unknown key of the
    hardware."""
    value_by_key: dict[str, str] = {}
    numbers: dict[str, float] = {}
    other_words: list[str] = []
    problems: list[Problem] = []
    for word in argv:
        key, equals, value = word.partition("=")
        if equals and key in ("hardware", "nodes", "price", "images"):
            value_by_key[key] = value
        elif equals and key.startswith("hardware."):
            name = key.removeprefix("hardware.")
            if name not in NUMBERS:
                fix = "; ".join(f"hardware.{field_name}: {meaning}" for field_name, meaning in NUMBERS.items())
                problems.append(Problem(key, "hardware has no such number", fix, value))
            elif (number := _number(value)) is None:
                problems.append(Problem(key, "expected a number above 0", f"{key}=80", value))
            else:
                numbers[name] = number
        elif word not in ("--json", "--calibrate"):
            other_words.append(word)
    nodes, price = _number(value_by_key.get("nodes", "1")), _number(value_by_key.get("price", "1"))
    if nodes is None or nodes != int(nodes) or nodes > MOST_NODES:
        problems.append(Problem("nodes", "expected a number of nodes", "nodes=4", value_by_key["nodes"]))
    if price is None:
        problems.append(Problem("price", "expected a price above 0", "price=2.5", value_by_key["price"]))
    images = parse_images(value_by_key["images"]) if "images" in value_by_key else None
    if "images" in value_by_key and images is None:
        fix = "images=1024x768, or images=2x1024x768"
        problems.append(Problem("images", "expected a size", fix, value_by_key["images"]))
    if problems:
        raise UserError(problems)
    return Arguments(
        hardware=value_by_key.get("hardware"),
        numbers=numbers,
        nodes=int(nodes or 1) if "nodes" in value_by_key else None,
        price=price if "price" in value_by_key else None,
        images=images,
        json="--json" in argv,
        calibrate="--calibrate" in argv,
        rest=other_words,
    )


def _number(text: str) -> float | None:
    return float(text) if re.fullmatch(r"\d+(\.\d+)?([eE]\d+)?", text) and 0 < float(text) < math.inf else None


@dataclass(frozen=True)
class Planned:
    plan: Plan
    cluster: Cluster
    setup: Setup
    precision: Precision
    parameters: int
    """Of the whole model."""
    trained: int
    """Of them, or of adapters on them."""
    calibrated: bool = False
    """Whether the speeds were measured on this machine."""
    stage_origin: str | None = None
    """Why the stage is the configured one, where that was left to the plan."""
    others: Mapping[str, Planned] = field(default_factory=dict)
    """Plans of other methods, the configured one among them, by the method's name."""
    growth: Growth | None = None
    """What the chat template makes of the conversations, where some become several samples."""


def growth(config: RunConfig) -> Growth | None:
    """Return how many samples and tokens the run's conversations become, where model and rows are on this machine and a chat
    template makes several samples of some."""
    if not task_of(config.task).splits_conversations or not (config.data.train or config.data.mixture):
        return None
    if not Path(config.model.path).is_dir():
        return None
    os.environ.update(NO_TELEMETRY | OFFLINE)
    from dstune.data.chat.factor import growth_of
    from dstune.models.load import load_tokenizer

    try:
        tokenizer = load_tokenizer(config.model)
        estimate = growth_of(config, tokenizer) if tokenizer.chat_template else None
    except (UserError, OSError, ValueError):
        return None  # a plan needs no rows; a run reports what is wrong with them
    return estimate if estimate and estimate.samples > estimate.conversations else None


def plan_of(config: RunConfig, arguments: Arguments, images: Images | None = None) -> Planned:
    """Return the plan of a run on the hardware that the arguments name, or on this machine."""
    cluster = cluster_of(config, arguments)
    if arguments.hardware is not None or arguments.numbers or cluster.nodes > 1:
        return planned(config, cluster, images=images)
    return planned(config, cluster, speeds(cluster.per_node, on_gpu=cluster.device.gpu), images)


def cluster_of(config: RunConfig, arguments: Arguments) -> Cluster:
    """Return the hardware that the arguments name, or this machine. Raises UserError."""
    nodes = arguments.nodes or launcher_of(config.launch).nodes()
    if arguments.hardware is not None or arguments.numbers:
        return hardware.parse(arguments.hardware, arguments.numbers, nodes)
    return replace(machine.here(config).cluster, nodes=nodes)


def planned(
    config: RunConfig, cluster: Cluster, measured: dict[int, Speed] | None = None, images: Images | None = None
) -> Planned:
    """Plan a run. measured: speeds by the bytes of a weight, in place of the hardware table's. images: of a row.

    Raises UserError where the model's architecture is not known."""
    origin = None
    if is_open(config):
        config, origin = choose_planned_stage(config, cluster, measured, images)
    configured, precision, model = setup_on(config, cluster, images)
    any_rows = config.trainer.micro_batch_size is Automatic.auto
    choices = plan(configured, cluster, all_speeds(cluster, measured), any_rows=any_rows)
    count = sum(tensor.count for tensor in method_of(config.method).trained(model)[0])
    if configured.tower and configured.tower.learns:
        count += configured.trained[-1].count
    return Planned(choices, cluster, configured, precision, model.parameters, count, bool(measured), origin)


# ---- output ----


def as_json(estimate: Planned, price: float | None, config: RunConfig) -> dict[str, Any]:
    """Return the public contract of `plan --json`, and more keys beside it."""
    best = estimate.plan.recommended
    return {
        "choices": [row(choice, estimate, price, config) for choice in estimate.plan.choices],
        "recommended": best.overrides(estimate.setup) if best else {},
        "fits": best is not None,
        "configured": row(estimate.plan.configured, estimate, price, config),
        "stage_origin": estimate.stage_origin,
        "hardware": {
            "device": estimate.cluster.device.name,
            "per_node": estimate.cluster.per_node,
            "nodes": estimate.cluster.nodes,
            "memory_gib": round(estimate.cluster.device.memory_gib, 2),
        },
        "host_gib_per_node": round(_node_gib(best), 2) if best else None,
        "methods": {name: _method_row(other) for name, other in estimate.others.items()},
        "images": estimate.setup.images_of_row and asdict(estimate.setup.images_of_row),
        "conversations": estimate.growth
        and {**asdict(estimate.growth), "token_factor": round(estimate.growth.factor, 3)},
        "warnings": _warnings(estimate, config),
        "calibrated": estimate.calibrated,
        "model": {
            "path": config.model.path,
            "parameters": estimate.parameters,
            **({"active": estimate.setup.model.active_parameters} if estimate.setup.model.experts else {}),
            "trained": estimate.trained,
            **({"unreached": estimate.setup.unreached} if estimate.setup.unreached else {}),
            "precision": estimate.precision.value,
        },
    }


def _warnings(estimate: Planned, config: RunConfig) -> list[str]:
    return [*fillers(config, estimate.cluster.ranks), *uncounted_models(config)]


def _method_row(estimate: Planned) -> dict[str, Any]:
    best = estimate.plan.recommended
    choice = best or min(estimate.plan.choices, key=lambda choice: choice.memory_gib)
    return {
        "fits": best is not None,
        "memory_gib_per_rank": round(choice.memory_gib, 4),
        "host_gib_per_node": round(_node_gib(choice), 2),
        "step_seconds": round(choice.time.seconds, 4),
        "recommended": best.overrides(estimate.setup) if best else {},
    }


def row(choice: Choice, estimate: Planned, price: float | None, config: RunConfig) -> dict[str, Any]:
    """Return one choice, numbers only."""
    time = choice.time
    hours = _hours(choice, config)
    hours_per_billion = 1e9 / time.tokens_per_second / 3600
    return {
        "zero": choice.zero,
        "hpz": choice.setup.copy_ranks > 1,
        "offload": choice.offload,
        "activation_checkpointing": as_word(choice.checkpointing),
        "micro_batch_size": choice.setup.micro_batch_size,
        "memory_gib_per_rank": round(choice.memory_gib, 4),
        "host_gib_per_rank": round(choice.memory.host / GIB, 4),
        "fits": choice.fits,
        "parts_gib": {name: round(size / GIB, 4) for name, size in choice.memory.parts.items() if size}
        | {"margin": round(choice.memory.margin / GIB, 4)},
        "peak": choice.memory.peak,
        "step_seconds": round(time.seconds, 4),
        "tokens_per_second": round(time.tokens_per_second, 1),
        "communication_gib_per_step": round(time.volume / GIB, 4),
        "hours": hours and round(hours, 3),
        "hours_per_billion_tokens": round(hours_per_billion, 2),
        "cost": price and hours and round(price * hours * estimate.cluster.ranks, 2),
        "cost_per_billion_tokens": price and round(price * hours_per_billion * estimate.cluster.ranks, 2),
    }


def _hours(choice: Choice, config: RunConfig) -> float | None:
    steps = config.trainer.max_steps
    return steps * choice.time.seconds / 3600 if steps else None


def as_text(estimate: Planned, price: float | None, config: RunConfig, words: Sequence[str] | None = None) -> str:
    """Return the plan for people: whether and how it fits, other methods beside it, the run as configured part by part, then the
    choices.

    words: of the command, to which the recommended ones are added; None where there is no command.
    """
    cluster, s = estimate.cluster, estimate.setup
    width, hosted = _offload_width(estimate), _hosted(estimate)
    nodes = f"{cluster.nodes} nodes of " if cluster.nodes > 1 else ""
    lines = [
        (
            f"{config.model.path}: {estimate.parameters / 1e9:.3f}B parameters, {_active(s)}{estimate.trained / 1e6:.1f}M trained "
            f"({config.method.name}), {estimate.precision.value}, rows of {s.length} tokens"
            + (f"; beside them {s.unreached / 1e9:.3f}B frozen that text never reaches" if s.unreached else "")
        ),
        *images_in_text(s),
        *_counted(s),
        *_stored(config),
        f"{nodes}{cluster.per_node} x {cluster.device.name}, {cluster.device.memory_gib:.1f} GiB for each rank",
        "",
        *_verdict(estimate, words, config),
        *_compared(estimate),
        "",
        f"as configured ({_configured(estimate)}):",
        *([f"  zero.stage=auto: {estimate.stage_origin}"] if estimate.stage_origin else []),
        *_parts(estimate.plan.configured),
        *_growth(estimate.growth),
        *(f"  warning: {warning}" for warning in _warnings(estimate, config)),
        "",
        (
            f"{'zero':<{_zero_width(estimate)}}{'offload':<{width}}{'micro-batch':>11}{'GiB a rank':>12}"
            f"{'on the host' if hosted else '':>{12 * hosted}}"
            f"{'fits':>6}{'step':>10}{'tokens/s':>12}{'sent a step':>13}{_time_heading(price, config)}"
        ),
        *(_line(choice, estimate, price, config) for choice in estimate.plan.choices),
    ]
    lines += [*_columns(estimate, price, config), ""]
    margin = (
        "Memory includes a margin"
        if estimate.setup.on_gpu
        else "heap: what was freed before the peak, and glibc keeps, activations mostly"
    )
    lines.append(f"{margin}; {_source_of_times(estimate)}")
    return "\n".join(lines)


def _active(s: Setup) -> str:
    """Return how many parameters a token uses, of a model with experts."""
    return f"{s.model.active_parameters / 1e9:.3f}B of them for a token, " if s.model.experts else ""


def _counted(s: Setup) -> list[str]:
    """Return what is estimated of a model without a closed form."""
    if not s.model.is_counted:
        return []
    estimated = (
        "activations and step times are estimated as those of a decoder with such matrices, which nothing measured"
    )
    return [f"{s.model.kind}: its tensors were counted by transformers; {estimated}"]


def _stored(config: RunConfig) -> list[str]:
    """Return how the weights are stored, if that differs from how they are trained."""
    description = describe_stored_format(whole_config_json(config.model))
    return [description] if description else []


def _verdict(estimate: Planned, words: Sequence[str] | None, config: RunConfig) -> list[str]:
    """Return whether the run fits, what it needs, and the recommended command."""
    best = estimate.plan.recommended
    if best is None:
        return [f"no: {_nothing_fits(estimate)}"]
    cluster = estimate.cluster
    host = _node_gib(best)
    of_node, condition = "", ""
    if host >= 1 and cluster.host_gib is not None:
        of_node = f", and {host:.0f} of {cluster.host_gib:.0f} GiB of the memory of each node"
    elif host >= 1:  # nobody said how much a node has
        condition = f", if each node has {host:.0f} GiB of memory for it (hardware.host_gib=)"
    time = f"a step of {best.time.seconds:.2f} s, {best.time.tokens_per_second:,.0f} tokens/s"
    overrides = [f"{key}={_value(value)}" for key, value in best.overrides(estimate.setup).items()]
    fits = f"{best.memory_gib:.1f} of {cluster.device.memory_gib:.1f} GiB a rank{of_node}; {time}"
    as_recommended = f"yes, as recommended{condition}: {fits}"
    verdict = [_configured_verdict(estimate, config), as_recommended] if overrides else [f"yes{condition}: {fits}"]
    lines = [*verdict, f"recommended: {' '.join(overrides) or 'as configured'}"]
    if words is not None:
        changed = {key_of(word) for word in overrides}
        rows = [] if config.data.train or config.data.mixture else ["data.train=FILE"]
        command = ["dstune", "train", *(word for word in words if key_of(word) not in changed), *rows, *overrides]
        refused = _set_by_file(command[2:], config) if overrides else []
        first = f'with "auto" in {config.zero.path} for what sets {" and ".join(refused)}: ' if refused else ""
        lines.append(f"  {first}{shlex.join(command)}")
    return lines


def _set_by_file(words: Sequence[str], config: RunConfig) -> list[str]:
    """Return the keys of the words that the file `zero.path` sets to another value, for which they would be refused."""
    if config.zero.path is None:
        return []
    flags = hydra_flags(list(words))
    try:
        compose(flags.overrides, flags.config_dirs)
    except UserError as error:
        return [problem.where for problem in error.problems if problem.where in map(key_of, words)]
    return []


def _configured_verdict(estimate: Planned, config: RunConfig) -> str:
    """Return whether the run fits as configured, and which share of it counts for nothing."""
    choice, cluster = estimate.plan.configured, estimate.cluster
    if choice.fits:
        time = f"a step of {choice.time.seconds:.2f} s, {choice.time.tokens_per_second:,.0f} tokens/s"
        computed, idle = shares(config, cluster.ranks, choice.setup.micro_batch_size)
        wasted = f"; {idle} of its {computed} micro-batches count for nothing" if idle >= IDLE * computed else ""
        return (
            f"yes, as configured: {choice.memory_gib:.1f} of {cluster.device.memory_gib:.1f} GiB a rank; {time}{wasted}"
        )
    if choice.memory_gib > cluster.device.memory_gib or cluster.host_gib is None:
        takes = f"{choice.memory_gib:.1f} GiB a rank, there are {cluster.device.memory_gib:.1f}"
    else:
        takes = f"{_node_gib(choice):.0f} GiB of the memory of each node, there are {cluster.host_gib:.0f}"
    return f"no, not as configured: it takes {takes}"


def _node_gib(choice: Choice) -> float:
    """Return the host memory that the ranks of a node take together, in GiB."""
    return choice.memory.host * choice.setup.ranks_per_node / GIB


def _compared(estimate: Planned) -> list[str]:
    """Return a line for each method that was planned for comparison."""
    if not estimate.others:
        return []
    lines = ["", f"{'method':<9}{'fits':<6}{'GiB a rank':>11}{'GiB of a node':>15}{'step':>11}{'tokens/s':>12}  how"]
    for method, other in estimate.others.items():
        best = other.plan.recommended
        choice = best or min(other.plan.choices, key=lambda choice: choice.memory_gib)
        rows = f"micro-batch {choice.setup.micro_batch_size}"
        how = ", ".join(
            filter(None, [choice.partitioning, _offload(choice, other).removeprefix("none").lstrip("+"), rows])
        )
        lines.append(
            f"{method:<9}{'yes' if best else 'no':<6}{choice.memory_gib:>11.1f}{_node_gib(choice):>15.0f}"
            f"{choice.time.seconds:>9.2f} s{choice.time.tokens_per_second:>12,.0f}  {how}"
        )
    return lines


def other_methods(config: RunConfig, cluster: Cluster, configured: Planned) -> dict[str, Planned]:
    """Plan full fine-tuning, LoRA and QLoRA if the run uses one of them and generates text; otherwise return nothing.

    A method that would take more memory than one before it in `COMPARED` for no more speed is planned for that one's memory."""
    if config.method.name not in COMPARED or not task_of(config.task).generates:
        return {}
    estimate_by_method = {}
    for name in COMPARED:
        if name == config.method.name:
            estimate_by_method[name] = configured
            continue
        try:
            other = replace(config, method=METHODS.classes()[name].Config())
            if not _of_plan(find_problems(other)):
                images = configured.setup.images_of_row
                estimate = planned(other, cluster, images=images)
                for before in estimate_by_method.values():
                    estimate = _within_memory_of(before, estimate, other, images)
                estimate_by_method[name] = estimate
        except UserError:
            continue  # this model cannot be trained by the method
    return estimate_by_method if len(estimate_by_method) > 1 else {}


COMPARED = ("full", "lora", "qlora")
"""From the method that needs the most memory to the one that needs the least."""


def _within_memory_of(before: Planned, estimate: Planned, config: RunConfig, images: Images | None) -> Planned:
    """Return the estimate, planned again for the memory that `before` is recommended to take if it takes more for no more speed."""
    best, other = estimate.plan.recommended, before.plan.recommended
    if best is None or other is None or best.memory_gib <= other.memory_gib:
        return estimate
    if best.time.seconds < (1 - SAME_SPEED) * other.time.seconds:
        return estimate
    device = replace(estimate.cluster.device, memory_gib=other.memory_gib)
    smaller = planned(config, replace(estimate.cluster, device=device), images=images)
    fits = smaller.plan.recommended
    return smaller if fits and (fits.offload == "none" or best.offload != "none") else estimate


def _growth(growth: Growth | None) -> list[str]:
    if growth is None:
        return []
    text = (
        f"  the chat template rewrites earlier turns: the first {growth.conversations:,} conversations make {growth.samples:,} "
        f"samples with {growth.factor:.1f} times their tokens, and so many steps (task.turns=last: one of each)"
    )
    return [text]


def _configured(estimate: Planned) -> str:
    """Return the configured stage, offload, checkpointing and micro-batch in words."""
    choice, rows = estimate.plan.configured, estimate.plan.configured.setup.micro_batch_size
    offload = f", offload {choice.offload}" if choice.offload != "none" else ""
    kind = "selective " if isinstance(choice.checkpointing, Selective) else ""
    checkpointing = f", {kind}activation checkpointing" if choice.checkpointing else ""
    return f"{choice.partitioning}{offload}{checkpointing}, micro-batch {rows}"


def _columns(estimate: Planned, price: float | None, config: RunConfig) -> list[str]:
    """Return what the columns of the choices mean."""
    time = "hours: of the whole run" if config.trainer.max_steps else "h/1e9 tok: hours for a billion tokens"
    cost = ", and what all devices cost for as long" if price else ""
    share = max(1, -(-estimate.setup.global_batch_size // estimate.setup.groups))
    host = ["on the host: GiB of its memory that a rank takes;"] if _hosted(estimate) else []
    return [
        (
            f"micro-batch: rows of a pass, as fast as any that fit of the {share} that trainer.global_batch_size leaves a "
            "rank: the configured ones, or the fewest;"
        ),
        *host,
        f"step, tokens/s: an optimizer step, over all ranks; sent a step: by each rank; {time}{cost}",
    ]


def _hosted(estimate: Planned) -> bool:
    return any(choice.memory.host for choice in estimate.plan.choices)


def _offload(choice: Choice, estimate: Planned) -> str:
    offload = choice.offload.replace("optimizer", "optimizer on disk") if choice.setup.swaps else choice.offload
    if effort(choice.checkpointing) == effort(estimate.setup.checkpointing):
        return offload
    return offload + ("+selective" if isinstance(choice.checkpointing, Selective) else "+checkpointing")


def _zero_width(estimate: Planned) -> int:
    return 2 + max(6, *(len(choice.partitioning) for choice in estimate.plan.choices))


def _offload_width(estimate: Planned) -> int:
    return 2 + max(15, *(len(_offload(choice, estimate)) for choice in estimate.plan.choices))


def _source_of_times(estimate: Planned) -> str:
    if estimate.calibrated:
        return "step times come from what `dstune plan --calibrate` measured here."
    if estimate.cluster.known:
        return "step times are estimates from data sheets."
    return "step times are rough: this hardware's speed is not known (`dstune plan --calibrate` measures this machine)."


def _parts(choice: Choice) -> list[str]:
    margin = "margin" if choice.setup.on_gpu else "heap, libraries"
    rows = [(name, size) for name, size in choice.memory.parts.items() if size] + [(margin, choice.memory.margin)]
    width = max(14, *(len(name) for name, _ in rows)) + 1
    lines = [f"  {name:<{width}}{size / GIB:>9.3f} GiB" for name, size in rows]
    verdict = "fits" if choice.fits else "does not fit"
    total = f"  {'at most':<{width}}{choice.memory_gib:>9.3f} GiB in the {choice.memory.peak}: {verdict}"
    host = [f"  {'in host memory':<{width}}{choice.memory.host / GIB:>9.3f} GiB a rank"] if choice.memory.host else []
    time = choice.time
    step = f"  a step of {time.seconds:.2f} s, {time.tokens_per_second:,.0f} tokens/s"
    return [*lines, total, *host, step]


def _time_heading(price: float | None, config: RunConfig) -> str:
    if config.trainer.max_steps:
        return f"{'hours':>9}" + (f"{'cost':>12}" if price else "")
    return f"{'h/1e9 tok':>11}" + (f"{'cost/1e9':>12}" if price else "")


def _line(choice: Choice, estimate: Planned, price: float | None, config: RunConfig) -> str:
    numbers = row(choice, estimate, price, config)
    host = f"{choice.memory.host / GIB:>12.2f}" if _hosted(estimate) else ""
    time = numbers["hours"] if numbers["hours"] is not None else numbers["hours_per_billion_tokens"]
    width = 9 if numbers["hours"] is not None else 11
    price_of = numbers["cost"] if config.trainer.max_steps else numbers["cost_per_billion_tokens"]
    cost = f"{price_of:>12,.2f}" if price_of is not None else ""
    return (
        f"{choice.partitioning:<{_zero_width(estimate)}}{_offload(choice, estimate):<{_offload_width(estimate)}}"
        f"{choice.setup.micro_batch_size:>11}{choice.memory_gib:>12.2f}{host}"
        f"{'yes' if choice.fits else 'no':>6}{choice.time.seconds:>8.2f} s{choice.time.tokens_per_second:>12.0f}"
        f"{choice.time.volume / GIB:>9.2f} GiB{time:>{width}.2f}{cost}"
    )


def _nothing_fits(estimate: Planned) -> str:
    device, host = estimate.cluster.device.memory_gib, estimate.cluster.host_gib
    least = min(estimate.plan.choices, key=lambda choice: choice.memory_gib)
    takes = "more ranks, shorter rows (data.max_length) or method=lora take less"
    if host is not None and least.memory_gib <= device:
        least = min((c for c in estimate.plan.choices if c.memory_gib <= device), key=lambda choice: choice.memory.host)
        of_node = least.memory.host * least.setup.ranks_per_node / GIB
        return (
            f"nothing fits: of the choices that fit the device, the least takes {of_node:.0f} GiB of a node's memory "
            f"({least.partitioning}, offload {least.offload}), there are {host:.0f} (hardware.host_gib); more nodes, or {takes}"
        )
    return (
        f"nothing fits: the least is {least.memory_gib:.1f} GiB a rank ({least.partitioning}, offload {least.offload}), there are "
        f"{device:.1f}; {takes}"
    )


def _value(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
