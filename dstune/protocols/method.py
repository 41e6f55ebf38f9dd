"""What a fine-tuning method is: which parameters it trains or adds, and how the result is saved, exported and merged.

Generic code asks `method_of(config.method)` and never looks at the class. `apply` and what it calls may import torch; import
it inside the methods, so that the launcher and the planner stay light.
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

    name: str = ""


@dataclass(frozen=True)
class Preparation:
    """What a method prepares on a copy of the model before the one that is trained is loaded."""

    data: PreparedData
    """What the run trains on."""

    def model(self, run: RunConfig, tokenizer: Any, dtype: torch.dtype) -> PreTrainedModel | None:
        """Return the model to train in place of the whole one; None for the whole one."""
        return None

    def restrict(self, module: nn.Module, new: NewWeights) -> None:
        """Freeze parameters before the optimizer is made."""

    @property
    def masks(self) -> Mapping[str, Tensor]:
        """Which entries of a parameter are trained, bool in its shape; all of those without a mask."""
        return {}

    @property
    def parameters_left_out(self) -> int:
        """Parameters of the pretrained model that `model` does without."""
        return 0

    def messages(self) -> Iterator[str]:
        """Yield what the console says of the preparation."""
        return iter(())

    def result(self, run: Training) -> dict[str, Any]:
        """Return what `result.json` gets beside the rest at the end of the run; asked on rank 0."""
        return {}


class Method:
    """Base of every method. Subclasses set `Config` and register with `@dstune.method`.

    Four members make a method; everything else has a default:

    - `apply(model, run)`: freezes parameters or adds new ones, before DeepSpeed gets the model.
    - `trained(model)`: says from the architecture alone which tensors are trained, for the planner.
    - `check(run)`: refuses settings that the method cannot be combined with.
    - `learning_rate`: the rate where the user gives none.

    What few methods do is an optional protocol: a method has its members or has not (`dstune.protocols.method_options`).
    """

    Config: ClassVar[type] = MethodConfig
    name: ClassVar[str] = ""

    def __init__(self, config: Any):
        self.config = config

    # ---- the model ----

    def apply(self, model: PreTrainedModel, run: RunConfig) -> nn.Module:
        """Freeze what is not trained and add the method's parameters; return the module to train. Every rank calls this.

        Raises UserError where the method does not fit the model.
        """
        return model

    def trained(self, model: Architecture) -> tuple[tuple[PlannedTensor, ...], int]:
        """Return the tensors that are trained, and the number of weights that stay frozen."""
        return model.tensors, 0

    def rates(self, module: nn.Module) -> Callable[[str], float]:
        """Return a function from a parameter's name to its factor on the learning rate. module: what `apply` returned."""
        return lambda name: 1.0

    # ---- rules, in the launching process ----

    def check(self, run: RunConfig) -> Iterator[Problem]:
        """Yield what the method's keys may not say together, or beside other sections."""
        return iter(())

    def check_sharded_weights(self, run: RunConfig) -> Iterator[Problem]:
        """Yield what is refused where ranks share the weights of each layer (`parallel=tensor`)."""
        reason = f"it is not known how ranks share what method={self.name} adds to layers or does to them"
        yield Problem("parallel", reason, "parallel=none, or method=full|lora", "tensor")

    def encoder_decoder_problem(self, kind: str) -> Problem | None:
        """Return what is wrong with an encoder-decoder. kind: its `model_type`."""
        return None

    def architecture_problem(self, model: Architecture) -> Problem | None:
        """Return what the method cannot do with an architecture. Ranks also refuse this for models that the planner does not
        know."""
        return None

    # ---- traits: what rules ask in place of the method's class ----

    adapter: ClassVar[bool] = False
    """It trains a few new parameters of peft beside frozen weights; the export is an adapter's folder."""
    merges: ClassVar[bool] = False
    """What it trains can become part of the model's own weights."""
    in_front: ClassVar[bool] = False
    """Trained positions stand in front of each row, or of its keys and values."""
    moves_weights: ClassVar[bool] = False
    """It changes pretrained weights, so that a distance to them is measured (`forgetting`)."""
    alters_updates: ClassVar[bool] = False
    """It changes gradients or optimizer states between the backward pass and the update."""
    scores_gradients: ClassVar[bool] = False
    """It scores weights by the gradients of single micro-batches at the start weights."""
    same_parameters_throughout: ClassVar[bool] = False
    """Every trained parameter has a gradient in every pass, from the first step to the last."""
    flops_known: ClassVar[bool] = True
    """The planner's operations are those of a step."""
    why_not_shared_rows: ClassVar[str] = ""
    """Why ranks cannot share a row (`parallel=ulysses`); empty where they can."""
    why_not_measured: ClassVar[str] = ""
    """Why `trainer.micro_batch_size=auto` cannot measure; empty where it can."""
    why_no_rollback: ClassVar[str] = ""
    """Why a run cannot go back to a checkpoint after a spike; empty where it can."""
    learning_rate: ClassVar[float] = 2e-5
    """The peak rate where `optimizer.lr` is not given: of AdamW, for a language model of usual size."""
    choice_settings: ClassVar[Mapping[str, Any]] = {}
    """Of a plugin: what choosing the method sets in other sections, such as `{"optimizer": {"lr": 1e-3}}`."""
    adapter_name: ClassVar[str] = ""
    """What a model card calls the adapter (`LoRA`); the method's name where it is empty."""

    @property
    def starts_at_base(self) -> bool:
        """Whether the model is the one that training began with once what the method added is switched off."""
        return False

    @property
    def adapter_dropout(self) -> float:
        """Dropout in front of adapters, for the planner."""
        return 0.0

    # ---- what generic code keeps of the configuration ----

    def identity(self) -> dict[str, Any]:
        """Return those of its keys on which the model that training starts from depends."""
        return asdict(self.config)

    @classmethod
    def example(cls) -> Any:
        """Return a configuration that can train: the defaults, with values for keys that need one."""
        return cls.Config()
