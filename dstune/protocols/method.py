"""What a fine-tuning method is: which parameters it trains or adds, and how the result is saved, exported and merged.

Generic code asks `method_of(config.method)` and never looks at the class. `apply` and what it calls may import torch; import
it inside the methods, so that the launcher and the planner stay light.

Traits, a closed list (the rules between task, method and parallelism read these instead of classes):

- `adapter`: a few new parameters of peft beside frozen weights; the export is an adapter's folder.
- `merges`: what it trains can become part of the model's own weights.
- `starts_at_base`: with what it added switched off, the model is the one that training began with.
- `in_front`: trained positions stand in front of each row, or of its keys and values.
- `moves_weights`: it changes pretrained weights, so a distance to them is measured (`forgetting`).
- `alters_updates`: it changes gradients or optimizer states between the backward pass and the update.
- `scores_gradients`: it scores weights by gradients of single micro-batches at the start weights.
- `same_parameters_throughout`: every trained parameter has a gradient in every pass, from the first step to the last.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from dstune.core.errors import Problem

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from dstune.config.schema import Precision, RunConfig
    from dstune.core.distributed import World
    from dstune.data.prepared import PreparedData
    from dstune.models.load import NewWeights
    from dstune.planning.architecture import Architecture
    from dstune.planning.architecture import Tensor as PlannedTensor
    from dstune.trainer.data_loader import DataLoader
    from dstune.trainer.loop import Training
    from dstune.zero.engine import Engine


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
        """The model to train in place of the whole one; None for the whole one."""
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
        """What the console says of the preparation."""
        return iter(())

    def result(self, run: Training) -> dict[str, Any]:
        """What `result.json` gets beside the rest at the end of the run; asked on rank 0."""
        return {}


class Method:
    """Base of every method. Subclasses set `Config` and register with `@dstune.method`."""

    Config: ClassVar[type] = MethodConfig
    name: ClassVar[str] = ""

    adapter: ClassVar[bool] = False
    merges: ClassVar[bool] = False
    in_front: ClassVar[bool] = False
    moves_weights: ClassVar[bool] = False
    alters_updates: ClassVar[bool] = False
    scores_gradients: ClassVar[bool] = False
    same_parameters_throughout: ClassVar[bool] = False

    adapter_name: ClassVar[str] = ""
    """What a model card calls the adapter (`LoRA`); the method's name where it is empty."""
    learning_rate: ClassVar[float] = 2e-5
    """The peak rate where `optimizer.lr` is not given: of AdamW, for a language model of usual size."""
    choice_settings: ClassVar[Mapping[str, Any]] = {}
    """Of a plugin: what choosing the method sets in other sections, such as `{"optimizer": {"lr": 1e-3}}`."""
    why_not_shared_rows: ClassVar[str] = ""
    """Why ranks cannot share a row (`parallel=ulysses`); empty where they can."""
    why_not_measured: ClassVar[str] = ""
    """Why `trainer.micro_batch_size=auto` cannot measure; empty where it can."""
    why_no_rollback: ClassVar[str] = ""
    """Why a run cannot go back to a checkpoint after a spike; empty where it can."""
    flops_known: ClassVar[bool] = True
    """Whether the planner's operations are those of a step."""

    def __init__(self, config: Any):
        self.config = config

    @classmethod
    def example(cls) -> Any:
        """A configuration that can train: the defaults, with values for keys that need one."""
        return cls.Config()

    @property
    def starts_at_base(self) -> bool:
        return False

    # -- rules: pure, in the launcher ---------------------------------------------------------------------------------

    def check(self, run: RunConfig) -> Iterator[Problem]:
        """What its keys may not say together, and beside other sections."""
        return iter(())

    def check_cpu(self, run: RunConfig) -> Iterator[Problem]:
        """What is refused where there is no GPU."""
        return iter(())

    def check_sharded_weights(self, run: RunConfig) -> Iterator[Problem]:
        """What is refused where ranks share the weights of each layer (`parallel=tensor`)."""
        reason = f"it is not known how ranks share what method={self.name} adds to layers or does to them"
        yield Problem("parallel", reason, "parallel=none, or method=full|lora", "tensor")

    def encoder_decoder_problem(self, kind: str) -> Problem | None:
        """What is wrong with an encoder-decoder of the architecture `kind`."""
        return None

    def architecture_problem(self, model: Architecture) -> Problem | None:
        """What the method cannot do with an architecture; ranks refuse it for models too that the planner does not know."""
        return None

    def missing(self) -> Iterator[Problem]:
        """Packages that it needs and that are not installed."""
        return iter(())

    # -- what it starts from ------------------------------------------------------------------------------------------

    @property
    def folders(self) -> list[str]:
        """Adapters that the run starts from, beside the model."""
        return []

    def resolve(self) -> MethodConfig:
        """The configuration with what files say that it names. Raises UserError."""
        config: MethodConfig = self.config
        return config

    def identity(self) -> dict[str, Any]:
        """What of its keys the model depends on that training starts from."""
        return asdict(self.config)

    def stages(self, run: RunConfig, run_dir: Path) -> list[RunConfig]:
        """The runs that are trained one after another. The last one is the run itself; the others have a `run.dir` in
        `run_dir`, and what they export is there for those behind them."""
        return [run]

    def prepare(
        self, run: RunConfig, data: PreparedData, tokenizer: Any, precision: Precision, world: World, run_dir: Path
    ) -> Preparation:
        """What is computed before the model is loaded. Every rank calls it; what the cache or the run directory has is not
        computed again."""
        return Preparation(data)

    # -- the model ----------------------------------------------------------------------------------------------------

    @property
    def own_head(self) -> dict[str, Any] | None:
        """Settings of a classifier in place of the architecture's (`models.pooled.DenseHead`)."""
        return None

    def load_options(self, run: RunConfig, dtype: torch.dtype) -> dict[str, Any]:
        """Arguments of `from_pretrained`. With any, transformers reads the files at every ZeRO stage."""
        return {}

    def after_load(self, model: PreTrainedModel) -> None:
        """Look at the model before anything is added to it. Raises UserError."""

    def apply(self, model: PreTrainedModel, run: RunConfig) -> nn.Module:
        """The model with the method's parameters added and the rest frozen. Every rank calls it.

        Raises UserError where the method does not fit the model.
        """
        return model

    def rates(self, module: nn.Module) -> Callable[[str], float]:
        """By name, the factors on the learning rate of the parameters of `module`, which `apply` returned."""
        return lambda name: 1.0

    def parts(self, module: nn.Module) -> Callable[[str], int]:
        """By name, the parts of `module` that parameters are in: those of different parts share no group of the optimizer."""
        return lambda name: 0

    def unfreezing(self, model: PreTrainedModel, engine: Engine, data_loader: DataLoader, step: int) -> Any:
        """Parts that begin to train later (`methods.ulmfit.unfreezing.Unfreezing`); None where the same ones train
        throughout. step: where the run goes on, 0 for a new one."""
        return None

    def cautions(self, run: Training) -> Iterator[str]:
        """What is allowed, and probably not meant."""
        return iter(())

    # -- the planner --------------------------------------------------------------------------------------------------

    @property
    def positions(self) -> int:
        """Of the positions that the model has, those that trained ones take in front of each row."""
        return 0

    @property
    def added_length(self) -> int:
        """Positions in front of each row that go through every layer as the row's own."""
        return 0

    @property
    def adapter_dropout(self) -> float:
        """Dropout in front of adapters."""
        return 0.0

    def frozen_bits(self, weight_bytes: int) -> int:
        """Bits of a frozen weight. weight_bytes: of one that is trained."""
        return 8 * weight_bytes

    def trained(self, model: Architecture) -> tuple[tuple[PlannedTensor, ...], int]:
        """The tensors that are trained, and how many weights stay frozen."""
        return model.tensors, 0

    # -- what is saved ------------------------------------------------------------------------------------------------

    @classmethod
    def serving_options(cls, record: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
        """Arguments of `from_pretrained` for the base model of an export. record: its `dstune.json`."""
        return {}

    def trained_on(self, model: nn.Module, trained: Mapping[str, Tensor]) -> Mapping[str, Callable[[Tensor], Tensor]]:
        """Modules of `model` whose frozen weights were others in training than in the files, and how those are made.

        trained: the tensors of the checkpoint.
        """
        return {}

    tensor_marks: ClassVar[tuple[str, ...]] = ()
    """Of a method that `merges`: what stands behind an adapted module's name in the names of its adapter's tensors."""

    def fill(self, module: nn.Module, trained: Mapping[str, Tensor]) -> None:
        """Give an adapted module, built without memory, what its adapter computes with beside the tensors of its own. Before
        it is merged."""

    def merged_bias(self, module: Any, bias: Tensor) -> Tensor:
        """The bias of an adapted module with its adapter in it."""
        return bias

    def plain_adapter(self, adapted: Any, trained: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of an adapter's file by name, where they are others than peft saves; `adapted`, the PeftModel, gets
        the settings for them."""
        return {}

    def record(self) -> dict[str, Any]:
        """What `dstune.json` of an export gets beside the rest."""
        return {}

    def without_paths(self, public_name: Callable[[str], str]) -> MethodConfig:
        """The configuration with names in place of paths of this machine."""
        config: MethodConfig = self.config
        return config
