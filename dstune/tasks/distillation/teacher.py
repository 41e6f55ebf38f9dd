"""The teacher of a distillation: a second model that is loaded beside the one that trains, and only computes logits."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from dstune.config.schema import ModelConfig, OptimizerOffload, Precision, RunConfig, stage_of
from dstune.core.distributed import World
from dstune.core.errors import Problem, UserError
from dstune.models.cross_entropy import chunk_rows
from dstune.models.heads.base import Batch, inputs_of
from dstune.models.heads.language import CausalLmHead, positions_with_target
from dstune.models.load import load_model, load_tokenizer
from dstune.models.logit_transform import LogitTransform, possible_transforms
from dstune.models.packing import TOLERANCE, contamination
from dstune.protocols import METHODS
from dstune.tasks.causal_lm.config import CausalLmConfig
from dstune.tasks.distillation.config import DistillationConfig
from dstune.zero import accelerator
from dstune.zero.ds_config import deepspeed_config
from dstune.zero.engine import Engine
from dstune.zero.parts import gathered, partitioned_loading
from dstune.zero.precision import DTYPES

activity = logging.getLogger(__name__)


class TeacherLogits(Protocol):
    """The teacher's logits of a batch's targets, computed chunk by chunk on request."""

    def __call__(self, rows: slice) -> Tensor:
        """Return the logits, fp32 [targets of `rows`, vocabulary]."""


class Teacher(Protocol):
    def observe(self, forward: Any, batch: Batch, positions: Tensor, width: int) -> TeacherLogits:
        """Return the teacher's logits at some positions, chunk by chunk. forward: of the model that trains. positions: indices
        into all rows end to end, each of `width` positions. Called without gradients; at stage 3 by every rank equally
        often."""

    def close(self) -> None: ...


class ProbedHead(CausalLmHead):
    """A head that detects how the model transforms its logits, and can return the hidden states in front of the projection."""

    def __init__(self, model: Any, rows: Any = None):
        super().__init__(model, rows)
        self._described = model
        self.transform = LogitTransform()

    def examine(self, forward: Any, device: torch.device) -> bool:
        """Return whether the logits are the projection's output, except for a known transform, which becomes `transform`."""
        for transform in possible_transforms(self._described):
            with transform.switched_off():
                is_plain = super().examine(forward, device)
            if is_plain and (not transform.switches or self._agrees(forward, device, transform)):
                self.transform = transform
                return True
        self._examined = False
        return False

    def hidden_states(self, forward: Any, inputs: Mapping[str, Any], positions: Tensor, width: int) -> Tensor:
        """Return the hidden states at `positions`, in front of the projection: [positions, hidden size]."""
        self._projected_positions, self._targets = (positions, width), positions
        try:
            forward(**inputs, use_cache=False)
            return self._hidden
        finally:
            self._projected_positions = self._targets = None
            del self._hidden

    def _projected(self, hidden: Tensor, targets: Tensor) -> Tensor:
        self._hidden = hidden
        return hidden[:, :1]  # nothing reads the model's output in this pass

    def _agrees(self, forward: Any, device: torch.device, transform: LogitTransform) -> bool:
        logits, probe = self._probed(forward, device)
        expected = transform(probe.float())
        limit = (1e-5 if logits.dtype is torch.float32 else 0.02) * float(expected.abs().max())
        return bool((logits.float() - expected).abs().max() <= limit)


@dataclass
class ChunkedLogits:
    """Computes the logits of one chunk of hidden states at a time. The last chunk is cached, since a loss reads it in blocks."""

    hidden: Tensor
    project: Any
    transform: LogitTransform
    rows: int
    """Hidden states in a chunk."""
    _first: int = 0
    _logits: Tensor | None = None

    def __call__(self, rows: slice) -> Tensor:
        logits = self._logits
        if logits is None or rows.start < self._first or rows.stop > self._first + len(logits):
            self._logits = None  # before the next chunk takes its place
            self._first = rows.start
            self._logits = logits = self.project(self.hidden[rows.start : max(rows.stop, rows.start + self.rows)])
        return self.transform(logits[rows.start - self._first : rows.stop - self._first].float())


class LoadedTeacher:
    """A separate teacher model: at stage 3 partitioned except for its projection, else complete on every rank."""

    def __init__(self, engine: Engine, head: ProbedHead, projection: nn.Linear):
        self._engine, self._head = engine, head
        weights = [weight for weight in projection.parameters() if weight is not None]
        with gathered(weights):  # copied, since a chunk of the loss needs them at a time without collectives
            copies = [weight.detach().clone() if engine.stage == 3 else weight.detach() for weight in weights]
        self._weight, self._bias = copies[0], copies[1] if len(copies) > 1 else None

    @property
    def device(self) -> torch.device:
        return self._engine.device

    @property
    def dtype(self) -> str:
        """Name of the dtype of its weights and hidden states, such as `bfloat16`."""
        return str(self._weight.dtype).removeprefix("torch.")

    @property
    def transform(self) -> LogitTransform:
        return self._head.transform

    def projection(self) -> dict[str, Tensor]:
        """Return the `weight` of the teacher's projection and, where it has one, its `bias`, on the host."""
        weights = {"weight": self._weight} | ({} if self._bias is None else {"bias": self._bias})
        return {name: value.cpu().contiguous() for name, value in weights.items()}

    @torch.no_grad()
    def states_of(self, batch: Batch) -> Tensor:
        """Compute the teacher's last hidden states that predict the targets of a batch, row by row: [targets, hidden size]. At
        stage 3 every rank calls this."""
        labels = self._head.labels_of(batch)
        return self._head.hidden_states(
            self._engine.forward, inputs_of(batch), positions_with_target(labels), labels.shape[1]
        )

    def observe(self, forward: Any, batch: Batch, positions: Tensor, width: int) -> TeacherLogits:
        hidden = self._head.hidden_states(self._engine.forward, inputs_of(batch), positions, width)
        rows = chunk_rows(hidden, len(self._weight))
        return ChunkedLogits(hidden, self._project, self._head.transform, rows)

    def _project(self, hidden: Tensor) -> Tensor:
        return functional.linear(hidden, self._weight, self._bias)

    def close(self) -> None:
        self._engine.close()


def load_teacher(config: RunConfig, tokenizer: Any, world: World, precision: Precision) -> LoadedTeacher:
    """Load `task.teacher`, on this rank together with the others.

    Raises:
        UserError: its vocabulary differs from the model's, its projection is not a linear layer with known outputs, or packed
            samples see each other.
    """
    teacher_config = run_of_teacher(config)
    path = teacher_config.model.path
    _check_tokens(tokenizer.get_vocab(), load_tokenizer(teacher_config.model).get_vocab(), path)
    activity.info("loading the teacher %s", path)
    settings = deepspeed_config(teacher_config, world.size, precision, on_gpu=accelerator.present())
    with partitioned_loading(settings):
        model = load_model(teacher_config, tokenizer, (), DTYPES[precision])
    projection = model.get_output_embeddings()
    head = ProbedHead(model)
    engine = Engine(model, None, settings, world)
    engine.train(False)
    if not (type(projection) is nn.Linear and head.examine(engine.forward, engine.device)):
        reason = "what it does with the logits of its projection is not known here"
        raise UserError(Problem("task.teacher", reason, "another teacher", path))
    if config.data.packing:
        difference, dtype = contamination(engine.forward, model.config.get_text_config().vocab_size, engine.device)
        if world.any(not difference <= TOLERANCE[dtype]):
            reason = f"its attention crosses packed samples (logits differ by {difference:.1%})"
            raise UserError(Problem("task.teacher", reason, "data.packing=false, or another model.attention", path))
    return LoadedTeacher(engine, head, projection)


def run_of_teacher(config: RunConfig) -> RunConfig:
    """Return the configuration of a run whose model is the teacher."""
    task = config.task
    assert isinstance(task, DistillationConfig) and task.teacher is not None
    model = ModelConfig(
        path=task.teacher,
        revision=task.teacher_revision,
        attention=config.model.attention,
        trust_remote_code=config.model.trust_remote_code,
    )
    zero = replace(config.zero, stage=3 if stage_of(config.zero) == 3 else 0, offload_optimizer=OptimizerOffload.none)
    return replace(config, model=model, method=METHODS.default(), task=CausalLmConfig(), zero=zero)


def _check_tokens(model_ids: Mapping[str, int], teacher_ids: Mapping[str, int], path: str) -> None:
    """Raise UserError unless the teacher has the model's tokens with the same ids."""
    if differing := [
        token for token in model_ids.keys() | teacher_ids.keys() if model_ids.get(token) != teacher_ids.get(token)
    ]:
        reason = (
            f"its tokens are not those of the model ({len(differing):,} differ, {sorted(differing)[0]!r} among them), so what both "
            "expect next cannot be compared"
        )
        raise UserError(Problem("task.teacher", reason, "a teacher with the tokenizer of the model", path))
