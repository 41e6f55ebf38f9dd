"""Defines a fine-tuning method: the parameters that it trains or adds, and how the result is saved, exported and merged.

Generic code asks `method_of(config.method)` and never looks at the class. `apply` may use torch, but must import it inside the
method, so that the launcher and the planner start fast.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from dstune.core.errors import Problem

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from dstune.config.schema import RunConfig
    from dstune.data.prepared import PreparedData
    from dstune.models.load import NewWeights
    from dstune.planning.architecture import Architecture
    from dstune.planning.architecture import Tensor as PlannedTensor
    from dstune.trainer.loop import Training


@dataclass(frozen=True)
class MethodConfig:
    """Base of every method's configuration: fields of a subclass become keys `method.FIELD`."""

    needs: ClassVar[str] = ""
    """Settings without which this method is refused, as advice names them: `method.first_layers=4`."""
    name: str = ""


@dataclass(frozen=True)
class Preparation:
    """The result of a method's work with a copy of the model, before the model to train is loaded."""

    data: PreparedData
    """The data that the run trains on."""

    def model(self, run: RunConfig, tokenizer: Any, dtype: torch.dtype) -> PreTrainedModel | None:
        """Return the model to train instead of the complete one; None for the complete one."""
        return None

    def restrict(self, module: nn.Module, new: NewWeights) -> None:
        """Freeze parameters before the optimizer is built."""

    @property
    def masks(self) -> Mapping[str, Tensor]:
        """The trained entries of parameters by name, bool in the parameter's shape. Parameters without a mask are trained
        completely."""
        return {}

    @property
    def parameters_left_out(self) -> int:
        """Number of the pretrained model's parameters that `model` does not have."""
        return 0

    def messages(self) -> Iterator[str]:
        """Yield lines about the preparation for the console."""
        return iter(())

    def result(self, run: Training) -> dict[str, Any]:
        """Return further entries of `result.json` at the end of the run. Only rank 0 calls this."""
        return {}


class Method:
    """Base of every method. Subclasses set `Config` and register with `@dstune.method`.

    Four members make a method; everything else has a default:

    - `apply(model, run)`: freezes parameters or adds new ones, before DeepSpeed gets the model.
    - `trained(model)`: says from the architecture alone which tensors are trained, for the planner.
    - `check(run)`: refuses settings that the method cannot be combined with.
    - `learning_rate`: the default of `optimizer.lr`.

    Abilities that few methods have are optional protocols (`dstune.protocols.method_options`).
    """

    Config: ClassVar[type] = MethodConfig
    name: ClassVar[str] = ""

    def __init__(self, config: Any):
        self.config = config

    # ---- the model ----

    def apply(self, model: PreTrainedModel, run: RunConfig) -> nn.Module:
        """Freeze the parameters that are not trained, add the method's own, and return the module to train. Every rank calls this.

        Raises UserError if the method does not fit the model.
        """
        return model

    def trained(self, model: Architecture) -> tuple[tuple[PlannedTensor, ...], int]:
        """Return the trained tensors and the number of frozen weights, for the planner."""
        return model.tensors, 0

    def rates(self, module: nn.Module) -> Callable[[str], float]:
        """Return a function that maps a parameter's name to its learning-rate factor. module: the result of `apply`."""
        return lambda name: 1.0

    # ---- rules, in the launching process ----

    def check(self, run: RunConfig) -> Iterator[Problem]:
        """Yield the settings of the method that contradict each other or other sections."""
        return iter(())

    def check_sharded_weights(self, run: RunConfig) -> Iterator[Problem]:
        """Yield the settings that are refused if ranks share the weights of each layer (`parallel=tensor`)."""
        reason = f"it is not known how ranks share what method={self.name} adds to layers or does to them"
        yield Problem("parallel", reason, "parallel=none, or method=full|lora", "tensor")

    def encoder_decoder_problem(self, kind: str) -> Problem | None:
        """Return why the method cannot train an encoder-decoder; None if it can. kind: the model's `model_type`."""
        return None

    def architecture_problem(self, model: Architecture) -> Problem | None:
        """Return why the method cannot train an architecture; None if it can. Ranks check this, too, for models that the planner
        does not know."""
        return None

    # ---- traits: rules ask for these instead of the method's class ----

    adapter: ClassVar[bool] = False
    """It trains a few new parameters of peft and freezes the model's weights; the export is an adapter's folder."""
    merges: ClassVar[bool] = False
    """The trained parameters can be merged into the model's weights."""
    in_front: ClassVar[bool] = False
    """Trained positions stand in front of each row, or of its keys and values."""
    moves_weights: ClassVar[bool] = False
    """It changes pretrained weights, so their distance to the original ones can be measured (`forgetting`)."""
    alters_updates: ClassVar[bool] = False
    """It changes gradients or optimizer states between the backward pass and the update."""
    scores_gradients: ClassVar[bool] = False
    """It scores weights by the gradients of single micro-batches before training."""
    same_parameters_throughout: ClassVar[bool] = False
    """Every trained parameter has a gradient in every pass, from the first step to the last."""
    flops_known: ClassVar[bool] = True
    """The planner's count of operations is right for a step of this method."""
    why_not_shared_rows: ClassVar[str] = ""
    """Why ranks cannot share a row (`parallel=ulysses`); empty if they can."""
    why_not_measured: ClassVar[str] = ""
    """Why `trainer.micro_batch_size=auto` cannot measure; empty if it can."""
    why_no_rollback: ClassVar[str] = ""
    """Why a run cannot go back to a checkpoint after a loss spike; empty if it can."""
    learning_rate: ClassVar[float] = 2e-5
    """The default of `optimizer.lr`: AdamW's peak rate for a language model of usual size."""
    choice_settings: ClassVar[Mapping[str, Any]] = {}
    """For plugins: the settings of other sections that choosing the method implies, such as `{"optimizer": {"lr": 1e-3}}`."""
    adapter_name: ClassVar[str] = ""
    """The adapter's name in a model card (`LoRA`); if empty, the method's name."""

    @property
    def starts_at_base(self) -> bool:
        """Whether switching off the method's parameters restores the model that training started with."""
        return False

    @property
    def adapter_dropout(self) -> float:
        """Probability of the dropout in front of adapters, for the planner."""
        return 0.0

    # ---- configurations for generic code ----

    def identity(self) -> dict[str, Any]:
        """Return the settings that determine the model that training starts from."""
        return asdict(self.config)

    @classmethod
    def example(cls) -> Any:
        """Return a configuration that can train: the defaults, with values for required keys."""
        return cls.Config()
