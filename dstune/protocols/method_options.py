"""Optional protocols for abilities that few methods have. Generic code asks `isinstance(method, TrainsInStages)`, never for a
class.

A method implements all members of a protocol or none. Registration refuses a method with only some of them, since nothing would
call these. To write only some, derive from the protocol, which has a default for each: `class Mine(dstune.Method,
QuantizesWeights)`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

from dstune.protocols.method import MethodConfig, Preparation

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from dstune.config.schema import Precision, RunConfig
    from dstune.core.distributed import World
    from dstune.core.errors import Problem
    from dstune.data.prepared import PreparedData
    from dstune.trainer.data_loader import DataLoader
    from dstune.trainer.loop import Training
    from dstune.zero.engine import Engine


@runtime_checkable
class HasRequirements(Protocol):
    """A method that has requirements on packages or hardware."""

    def missing(self) -> Iterator[Problem]:
        """Yield a problem for each package that the method needs and that is not installed."""
        return iter(())

    def check_cpu(self, run: RunConfig) -> Iterator[Problem]:
        """Yield the settings that are refused on a machine without a GPU."""
        return iter(())


@runtime_checkable
class StartsFromAdapters(Protocol):
    """A method that can start from adapters of earlier runs."""

    config: Any

    @property
    def folders(self) -> list[str]:
        """The folders of these adapters, as the configuration names them."""
        return []

    def resolve(self) -> MethodConfig:
        """Return the configuration with the settings of the adapters that it names. Raises UserError."""
        config: MethodConfig = self.config
        return config

    def without_paths(self, public_name: Callable[[str], str]) -> MethodConfig:
        """Return the configuration for a model card, with public names instead of paths on this machine."""
        config: MethodConfig = self.config
        return config


@runtime_checkable
class TrainsInStages(Protocol):
    """A method that trains in several consecutive runs."""

    def stages(self, run: RunConfig, run_dir: Path) -> list[RunConfig]:
        """Return the runs in order. The last one is `run` itself; the others have a `run.dir` below `run_dir`, where later stages
        find their exports."""
        return [run]


@runtime_checkable
class NeedsPreparation(Protocol):
    """A method that computes something with a copy of the model before the model to train is loaded."""

    def prepare(
        self, run: RunConfig, data: PreparedData, tokenizer: Any, precision: Precision, world: World, run_dir: Path
    ) -> Preparation:
        """Compute the preparation, or read it from the cache or the run directory. Every rank calls this."""
        return Preparation(data)


@runtime_checkable
class UnfreezesLater(Protocol):
    """A method that unfreezes parts of the model during the run."""

    def parts(self, module: nn.Module) -> Callable[[str], int]:
        """Return a function that maps a parameter's name to the number of its part. Parameters of different parts never share a
        group of the optimizer."""
        return lambda name: 0

    def unfreezing(self, model: PreTrainedModel, engine: Engine, data_loader: DataLoader, step: int) -> Any:
        """Return the object that unfreezes the parts (see `methods.ulmfit.unfreezing.Unfreezing`), or None. step: the step at which
        the run continues, 0 for a new run."""
        return None


@runtime_checkable
class QuantizesWeights(Protocol):
    """A method that stores frozen weights with fewer bits than the model's files."""

    def load_options(self, run: RunConfig, dtype: torch.dtype) -> dict[str, Any]:
        """Return arguments for `from_pretrained`. If there are any, transformers loads the model's files at every ZeRO stage."""
        return {}

    def after_load(self, model: PreTrainedModel) -> None:
        """Check or change the loaded model before `apply`. Raises UserError."""

    def frozen_bits(self, weight_bytes: int) -> int:
        """Return the bits of a frozen weight, for the planner. weight_bytes: bytes of a trained weight."""
        return 8 * weight_bytes

    def record(self) -> dict[str, Any]:
        """Return the entries about quantization in an export's `dstune.json`."""
        return {}

    @classmethod
    def serving_options(cls, record: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
        """Return arguments for `from_pretrained` of an export's base model. record: the export's `dstune.json`."""
        return {}


@runtime_checkable
class ReplacesHead(Protocol):
    """A method that can train a classifier of dstune instead of the architecture's."""

    @property
    def own_head(self) -> dict[str, Any] | None:
        """Arguments for `models.pooled.DenseHead`; None to keep the architecture's head."""
        return None


@runtime_checkable
class PutsPositionsInFront(Protocol):
    """A method whose trained positions stand in front of each row, or of its keys and values (`in_front`)."""

    @property
    def positions(self) -> int:
        """Number of positions that the trained ones take away from the model's limit."""
        return 0

    @property
    def added_length(self) -> int:
        """Number of positions in front of each row that pass through every layer, as the row's own do."""
        return 0


@runtime_checkable
class MergesAdapter(Protocol):
    """A method whose adapters can be merged into the model's weights (`merges`)."""

    tensor_marks: ClassVar[tuple[str, ...]] = ()
    """The text that follows a module's name in the names of its adapter's tensors (`.lora_`)."""

    def fill(self, module: nn.Module, trained: Mapping[str, Tensor]) -> None:
        """Set the buffers that merging needs, besides the trained tensors, in an adapted module that was built without memory."""

    def merged_bias(self, module: Any, bias: Tensor) -> Tensor:
        """Return the bias of an adapted module after merging its adapter."""
        return bias


@runtime_checkable
class ShiftsFrozenWeights(Protocol):
    """A method whose frozen weights in training differ from those in the model's files."""

    def trained_on(self, model: nn.Module, trained: Mapping[str, Tensor]) -> Mapping[str, Callable[[Tensor], Tensor]]:
        """Return, by the module's name in `model`, functions that map the weight in the files to the frozen weight in training.

        trained: the tensors of the checkpoint.
        """
        return {}

    def plain_adapter(self, adapted: Any, trained: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors, by name, of an equivalent adapter for the weights in the files, and write its settings into
        `adapted`, the PeftModel. Returns an empty dict if peft can save the trained tensors unchanged."""
        return {}


@runtime_checkable
class GivesCautions(Protocol):
    """A method that warns of settings that are allowed, but probably a mistake."""

    def cautions(self, run: Training) -> Iterator[str]:
        """Yield a console line for each such setting, before the first step."""
        return iter(())


METHOD_OPTIONS = (
    HasRequirements,
    StartsFromAdapters,
    TrainsInStages,
    NeedsPreparation,
    UnfreezesLater,
    QuantizesWeights,
    ReplacesHead,
    PutsPositionsInFront,
    MergesAdapter,
    ShiftsFrozenWeights,
    GivesCautions,
)
