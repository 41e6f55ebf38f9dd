"""Builds everything that a rank needs before the loop, step by step; later steps take what earlier ones return."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dstune.checkpoint.model_folder import parameter_names, refuse_added
from dstune.checkpoint.saves import Saves
from dstune.checkpoint.session import Checkpoints
from dstune.config.convert import format_value
from dstune.config.schema import Export, Precision, RunConfig, stage_of
from dstune.core.distributed import World
from dstune.core.paths import cache_root
from dstune.core.secrets import publish
from dstune.data.blocks import Blocks
from dstune.data.build import prepare, prove
from dstune.data.chat.evidence import Proof
from dstune.data.prepared import PreparedData
from dstune.generation.answers import write_texts
from dstune.models.heads import Head, Rows
from dstune.models.kernels import use_kernels
from dstune.models.load import load_config, load_model, load_tokenizer, new_weights
from dstune.models.lora_sum import use_joint_sums
from dstune.models.neftune import add_noise
from dstune.models.packed_attention import attention_of_samples
from dstune.models.tensor import slice_model
from dstune.models.ulysses import SequenceCut
from dstune.models.unreached import keep_frozen, vision_parts
from dstune.optim.groups import method_groups
from dstune.protocols import method_of, optimizer_of, parallelism_of, task_of
from dstune.protocols.method import Preparation
from dstune.protocols.method_options import NeedsPreparation, UnfreezesLater
from dstune.protocols.task_options import NeedsReference, TrainsOnRollouts
from dstune.tracking.console import Console, show_activities
from dstune.tracking.log import RunLog
from dstune.trainer import micro_batch
from dstune.trainer.callback_list import CallbackList
from dstune.trainer.callbacks.preemption import Preemption
from dstune.trainer.callbacks.startup_timer import StartupTimer
from dstune.trainer.data_loader import data_loader_of
from dstune.trainer.evaluate import Evaluator
from dstune.trainer.forgetting import Fisher, Penalties, general_fisher
from dstune.trainer.loop import Training
from dstune.trainer.memory import PeakMemory, keep_freed
from dstune.trainer.out_of_memory import advice
from dstune.trainer.sanity_checks import (
    check_padding,
    check_unreached,
    content_digest,
    examine,
    refuse_different_rows,
    refuse_sight_of_later_tokens,
    refuse_uneven_gathers,
    samples_digest,
    verify_rows,
)
from dstune.trainer.sight import prove_images, refuse_with_images
from dstune.trainer.state import TrainState
from dstune.trainer.utilization import prefetch_of, utilization_of
from dstune.zero import accelerator
from dstune.zero.ds_config import SHARD_SETTINGS, deepspeed_config
from dstune.zero.engine import Engine
from dstune.zero.node_copies import copy_ranks_of
from dstune.zero.parts import partitioned_loading
from dstune.zero.precision import DTYPES, resolve, set_arithmetic
from dstune.zero.slices import Slices

activity = logging.getLogger("dstune.worker")
"""Logs the activities before the first step, which rank 0 shows on the console."""


@dataclass(frozen=True)
class Layout:
    """A rank's precision, its part of rows and weights, and its DeepSpeed configuration."""

    precision: Precision
    cut: SequenceCut | None
    """The rank's positions of each row; None unless ranks share rows."""
    slices: Slices | None
    """The rank's part of each weight; None unless ranks share weights."""
    deepspeed: dict[str, Any]
    """DeepSpeed's configuration."""


@dataclass(frozen=True)
class LoadedRows:
    """The rows of a run as samples."""

    tokenizer: PreTrainedTokenizerBase
    data: PreparedData
    proof: Proof
    """Evidence that a server renders conversations as they are trained."""
    blocks: Blocks | None
    """The blocks of a stream; None for other data."""
    memory: PeakMemory


@dataclass(frozen=True)
class MethodStart:
    """What the method and the penalties of `forgetting` compute with a temporary copy of the model."""

    preparation: Preparation
    fisher: Fisher
    digests: Mapping[str, Any]
    """Digests of the samples, by which ranks and launches check that they have the same ones."""


@dataclass(frozen=True)
class BuiltModel:
    """The model of a run."""

    model: PreTrainedModel
    """The model that transformers loads."""
    module: torch.nn.Module
    """The module to train: `model` with the method's parameters."""
    head: Head
    rows: Rows | None
    """How a language model's rows are changed before its forward pass; None if they are not."""


@dataclass(frozen=True)
class Restored:
    """The state from which the run begins or continues."""

    config: RunConfig
    """With the chosen size of a micro-batch."""
    data: PreparedData
    state: TrainState
    checkpoints: Checkpoints
    metadata: dict[str, Any]
    """Written into every checkpoint."""


class Setup:
    """The steps before the loop, to be called in the order of the methods."""

    def __init__(self, config: RunConfig, run_dir: Path, world: World, preemption: Preemption, startup: StartupTimer):
        self.config, self.run_dir, self.world = config, run_dir, world
        self.preemption, self.startup = preemption, startup
        self.task, self.method = task_of(config.task), method_of(config.method)
        self.start_time = time.monotonic()
        self.console = Console()
        self.message: Callable[[str], None] = self.console.message if world.is_main else lambda text: None

    def configure_rank(self) -> Layout:
        """Choose the precision, form groups of ranks and write DeepSpeed's configuration."""
        config, world, on_gpu = self.config, self.world, accelerator.present()
        publish(str(self.run_dir))
        if world.is_main:
            show_activities(self.console)
        precision = Precision[world.broadcast(resolve(config).name)]
        parallel = parallelism_of(config.parallel)
        cut, slices = SequenceCut.of(parallel.row_ranks, world), Slices.of(parallel.weight_ranks, world)
        prefetch = prefetch_of(config) if on_gpu and stage_of(config.zero) == 3 else None
        copy_ranks, why_no_copies = copy_ranks_of(config.zero, world)
        if why_no_copies:
            self.message(f"zero.hpz=true has no effect: {why_no_copies}")
        deepspeed = deepspeed_config(
            config, world.size, precision, on_gpu=on_gpu, prefetch=prefetch, copy_ranks=copy_ranks
        )
        set_arithmetic(config.trainer)
        return Layout(precision, cut, slices, deepspeed)

    def load_data(self, layout: Layout) -> LoadedRows:
        """Tokenize the rows or load them from the cache, and check that a server renders conversations the same way."""
        config, world = self.config, self.world
        tokenizer = load_tokenizer(config.model)
        data = prepare(config, tokenizer, world.env, cache_root(), write=write_texts)
        self.startup.mark("data")
        proof = prove(config, tokenizer, data)
        self.startup.mark("proof")
        if proof.note:
            self.message(proof.note)
        refuse_with_images(config, data)
        blocks = None
        if (
            data.stream is not None
        ):  # built here so that the process that prepares the blocks starts while the model loads
            leader = world.local_rank == 0
            blocks = Blocks(
                config, tokenizer, data, self.run_dir, cache_root(), arguments=proof.arguments, leader=leader
            )
        memory = PeakMemory()
        if isinstance(self.task, NeedsReference):
            data = self.task.before_loading(config, data, tokenizer, world, layout.precision)
        self.startup.mark("data")
        return LoadedRows(tokenizer, data, proof, blocks, memory)

    def prepare_method(self, layout: Layout, rows: LoadedRows) -> tuple[MethodStart, LoadedRows]:
        """Compute what the method needs with a copy of the model; return it, and the rows to train on."""
        config, world, tokenizer, precision = self.config, self.world, rows.tokenizer, layout.precision
        activity.info("loading %s", format_value(config.model.path))
        digests = {"samples": samples_digest(rows.data), "content": content_digest(rows.data)}
        preparation = Preparation(rows.data)
        if isinstance(self.method, NeedsPreparation):
            preparation = self.method.prepare(config, rows.data, tokenizer, precision, world, self.run_dir)
        labels = preparation.data.labels
        fisher = general_fisher(config, labels, tokenizer, precision, world, preparation.restrict)
        return MethodStart(preparation, fisher, digests), replace(rows, data=preparation.data)

    def build_model(self, layout: Layout, rows: LoadedRows, start: MethodStart) -> BuiltModel:
        """Load the model, add the method's parameters, split it if ranks share rows or weights, and build the head."""
        config, dtype = self.config, DTYPES[layout.precision]
        with partitioned_loading(layout.deepspeed):
            model = start.preparation.model(config, rows.tokenizer, dtype)
            if model is None:
                model = load_model(config, rows.tokenizer, rows.data.labels, dtype)
        if layout.cut is not None:
            layout.cut.install(model)
        has_images = rows.data.train.images is not None  # masks separate the samples of such rows
        model_rows = layout.cut or (
            None if has_images else attention_of_samples(config, model, self.world, self.message)
        )
        base_names = parameter_names(model)
        module = self.method.apply(model, config)
        if config.run.export is not Export.none and not self.method.adapter:
            trained = (name for name, parameter in module.named_parameters() if parameter.requires_grad)
            refuse_added(base_names, trained, self.method.name)
        if layout.slices is not None:
            slice_model(module, model, layout.slices)
        use_kernels(module, config.model, self.message)
        use_joint_sums(module)
        if config.model.neftune_alpha:
            add_noise(module, model, config.model.neftune_alpha)
        self.startup.mark("model")
        head = self.task.head(model, model_rows)  # after the method: an adapter may wrap the projection
        return BuiltModel(model, module, head, model_rows)

    def build_engine(self, layout: Layout, built: BuiltModel, start: MethodStart) -> Engine:
        """Group the parameters, and build the optimizer and the DeepSpeed engine."""
        config, module = self.config, built.module
        start.preparation.restrict(module, new_weights(built.model))
        keep_frozen(built.model)
        optimizer, groups = optimizer_of(config.optimizer), method_groups(config, module, vision_parts(built.model))
        one_pass = is_one_pass(config)
        engine = Engine(
            module, optimizer, layout.deepspeed, self.world, groups=groups, one_pass=one_pass, slices=layout.slices
        )
        self.startup.mark("engine")
        return engine

    def check_arithmetic(
        self, rows: LoadedRows, built: BuiltModel, engine: Engine, start: MethodStart
    ) -> Penalties | None:
        """Check the head's sums and packed and padded rows, and build the penalties, while the model has its start weights."""
        config, world = self.config, self.world
        refuse_uneven_gathers(config, built.model, world)
        refuse_sight_of_later_tokens(config, engine, built.model, built.rows, world)
        examine(built.head, engine, built.model, config.model.path)
        check_unreached(built.model, engine)
        has_images = start.preparation.data.train.images is not None
        prove_images(config, engine, start.preparation.data, world, self.message)
        if start.preparation.masks:
            engine.mask(start.preparation.masks)
        penalties = None
        if config.forgetting.l2sp or config.forgetting.ewc:
            penalties = Penalties(config.forgetting, engine, new_weights(built.model), start.fisher)
        architecture = built.model.config.get_text_config()
        verify_rows(config, engine, built.head, built.rows, architecture, world, self.message, has_images=has_images)
        if getattr(built.head, "rows", None) is None:  # otherwise `verify_rows` has checked the changed rows
            check_padding(config, engine, built.model, rows.tokenizer, rows.data, world, self.message)
        keep_freed()
        refuse_different_rows(world, start.digests["samples"] + start.digests["content"])
        return penalties

    def restore(
        self, layout: Layout, rows: LoadedRows, built: BuiltModel, engine: Engine, start: MethodStart
    ) -> Restored:
        """Choose the size of a micro-batch, compute the reference's log-probabilities, and load the newest checkpoint."""
        world, padding, zero = self.world, rows.tokenizer.pad_token_id, layout.deepspeed["zero_optimization"]
        metadata: dict[str, Any] = {
            "world_size": world.size,
            "zero_stage": engine.stage,
            "weight_parts": 1 if layout.slices is None else layout.slices.parts,
            "shard_settings": {key: zero[key] for key in SHARD_SETTINGS if key in zero},
            "precision": layout.precision.value,
            "labels": list(rows.data.labels),
            "chat_template_kwargs": dict(rows.proof.arguments),
            **start.digests,
        }
        checkpoints = Checkpoints(self.config, self.run_dir, engine, world, metadata, self.message)
        trials = micro_batch.Trials(
            self.config, rows.data.train, engine, built.head, world, padding, rows.memory, self.message
        )
        # Before any layers are frozen: memory is at its peak when all of them train.
        config, choice = trials.choose_micro_batch_size(checkpoints.remembered(micro_batch.NAME))
        data = rows.data
        if isinstance(self.task, NeedsReference):
            data = self.task.before_training(config, data, engine, built.head, world, padding, layout.precision)
        state = checkpoints.resume()
        if choice is not None:
            state.results[micro_batch.NAME] = choice
        checkpoints.check_space()
        return Restored(config, data, state, checkpoints, metadata)

    def build_training(
        self,
        layout: Layout,
        rows: LoadedRows,
        built: BuiltModel,
        engine: Engine,
        penalties: Penalties | None,
        restored: Restored,
    ) -> Training:
        """Build the data loader, the evaluator, the log and the callbacks, and put them into a `Training`."""
        world, run_dir, tokenizer = self.world, self.run_dir, rows.tokenizer
        config, data, state, head = restored.config, restored.data, restored.state, built.head
        data_loader = data_loader_of(config, data, rows.blocks, state.cursor)
        unfreezing = rollouts = log = None
        if isinstance(self.method, UnfreezesLater):
            unfreezing = self.method.unfreezing(built.model, engine, data_loader, state.step)
        if world.is_main:
            log = RunLog(config, run_dir, resumed_at_step=state.step or None, console=self.console)
        evaluator = Evaluator(config, data, engine, head, world, tokenizer, lambda: run.trainer_state)
        utilization = utilization_of(config, built.model, built.module, layout.precision, world, len(data.labels))
        if isinstance(self.task, TrainsOnRollouts):
            rollouts = self.task.rollouts(config, data, engine, head, tokenizer, world, run_dir)
        run = Training(
            config=config,
            world=world,
            run_dir=run_dir,
            engine=engine,
            head=head,
            data=data,
            data_loader=data_loader,
            total_steps=config.trainer.max_steps or data_loader.steps(config.trainer.epochs),
            state=state,
            evaluator=evaluator,
            rewind=restored.checkpoints.rewind,
            saves=Saves(config, run_dir, engine, world, restored.metadata, self.message),
            log=log,
            memory=rows.memory,
            pad_token_id=tokenizer.pad_token_id,
            utilization=utilization,
            preemption=self.preemption,
            startup=self.startup,
            unfreezing=unfreezing,
            penalties=penalties,
            rollouts=rollouts,
            start_time=self.start_time,
            seconds_before=state.seconds,
        )
        run.callbacks = CallbackList.for_run(run)
        return run

    def place(self, activity: str) -> Callable[[], str]:
        """Return a function that names the activity in which memory ran out, and with several ranks the rank."""
        return lambda: activity if self.world.size == 1 else f"{activity} on rank {self.world.rank}"

    def less_memory(self, layout: Layout) -> list[str]:
        """Return overrides with which the run would need less memory."""
        values = load_config(self.config.model).get_text_config().to_dict()
        return advice(self.config, values, layout.precision, self.world.size, self.world.local_size)


def is_one_pass(config: RunConfig) -> bool:
    """Return whether each micro-batch passes a decoder once and the same parameters train at every step."""
    return task_of(config.task).one_pass and method_of(config.method).same_parameters_throughout
