"""What few methods do, as protocols: generic code asks `isinstance(method, TrainsInStages)`, never for a class.

A method has all members of a protocol or none: one that has some of them is refused when it registers, since nothing would call
them. To write only some, derive from the protocol, which has a default for each: `class Mine(dstune.Method, QuantizesWeights)`.
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
    """A method that not every machine can run."""

    def missing(self) -> Iterator[Problem]:
        """Yield a problem for each package that the method needs and that is not installed."""
        return iter(())

    def check_cpu(self, run: RunConfig) -> Iterator[Problem]:
        """Yield what is refused on a machine without a GPU."""
        return iter(())


@runtime_checkable
class StartsFromAdapters(Protocol):
    """A method that may start from adapters of an earlier run, beside the model."""

    config: Any

    @property
    def folders(self) -> list[str]:
        """The adapters' folders, as the configuration names them."""
        return []

    def resolve(self) -> MethodConfig:
        """Return the configuration with the settings of the adapters that it names. Raises UserError."""
        config: MethodConfig = self.config
        return config

    def without_paths(self, public_name: Callable[[str], str]) -> MethodConfig:
        """Return the configuration with public names in place of paths of this machine, for a model card."""
        config: MethodConfig = self.config
        return config


@runtime_checkable
class TrainsInStages(Protocol):
    """A method that trains several runs one after another."""

    def stages(self, run: RunConfig, run_dir: Path) -> list[RunConfig]:
        """Return the runs in their order. The last one is `run` itself; the others have a `run.dir` below `run_dir`, where
        later stages find their exports."""
        return [run]


@runtime_checkable
class NeedsPreparation(Protocol):
    """A method that computes something on a copy of the model before the one that is trained is loaded."""

    def prepare(
        self, run: RunConfig, data: PreparedData, tokenizer: Any, precision: Precision, world: World, run_dir: Path
    ) -> Preparation:
        """Compute it, or read it from the cache or the run directory. Every rank calls this."""
        return Preparation(data)


@runtime_checkable
class UnfreezesLater(Protocol):
    """A method that trains more parts of the model as the run goes on."""

    def parts(self, module: nn.Module) -> Callable[[str], int]:
        """Return a function from a parameter's name to the number of its part. Parameters of different parts share no group
        of the optimizer."""
        return lambda name: 0

    def unfreezing(self, model: PreTrainedModel, engine: Engine, data_loader: DataLoader, step: int) -> Any:
        """Return what unfreezes the parts (see `methods.ulmfit.unfreezing.Unfreezing`), or None. step: the one at which the
        run continues, 0 for a new run."""
        return None


@runtime_checkable
class QuantizesWeights(Protocol):
    """A method that keeps frozen weights in fewer bits than the files have."""

    def load_options(self, run: RunConfig, dtype: torch.dtype) -> dict[str, Any]:
        """Return arguments for `from_pretrained`. If there are any, transformers reads the files at every ZeRO stage."""
        return {}

    def after_load(self, model: PreTrainedModel) -> None:
        """Check or change the loaded model before `apply`. Raises UserError."""

    def frozen_bits(self, weight_bytes: int) -> int:
        """Return the bits of a frozen weight, for the planner. weight_bytes: bytes of a trained one."""
        return 8 * weight_bytes

    def record(self) -> dict[str, Any]:
        """Return what `dstune.json` of an export says of the quantization."""
        return {}

    @classmethod
    def serving_options(cls, record: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
        """Return arguments of `from_pretrained` for the base model of an export. record: its `dstune.json`."""
        return {}


@runtime_checkable
class ReplacesHead(Protocol):
    """A method that may train a classifier of dstune's in place of the architecture's."""

    @property
    def own_head(self) -> dict[str, Any] | None:
        """Arguments of `models.pooled.DenseHead`; None keeps the architecture's head."""
        return None


@runtime_checkable
class PutsPositionsInFront(Protocol):
    """A method whose trained positions stand in front of each row, or of its keys and values (`in_front`)."""

    @property
    def positions(self) -> int:
        """Positions of the model's limit that the trained ones take."""
        return 0

    @property
    def added_length(self) -> int:
        """Positions in front of each row that go through every layer as the row's own do."""
        return 0


@runtime_checkable
class MergesAdapter(Protocol):
    """A method whose adapters can become part of the model's own weights (`merges`)."""

    tensor_marks: ClassVar[tuple[str, ...]] = ()
    """What follows a module's name in the names of its adapter's tensors (`.lora_`)."""

    def fill(self, module: nn.Module, trained: Mapping[str, Tensor]) -> None:
        """Give an adapted module, which was built without memory, the buffers that merging needs beside its trained tensors."""

    def merged_bias(self, module: Any, bias: Tensor) -> Tensor:
        """Return the bias of an adapted module with its adapter merged."""
        return bias


@runtime_checkable
class ShiftsFrozenWeights(Protocol):
    """A method that trains beside frozen weights that are not those of the model's files."""

    def trained_on(self, model: nn.Module, trained: Mapping[str, Tensor]) -> Mapping[str, Callable[[Tensor], Tensor]]:
        """Return, by the name of a module of `model`, the function from its weight in the files to its frozen weight in training.

        trained: the tensors of the checkpoint.
        """
        return {}

    def plain_adapter(self, adapted: Any, trained: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors, by name, of an adapter for the weights in the files, and put its settings into `adapted`, the
        PeftModel. Empty where peft saves them as they are."""
        return {}


@runtime_checkable
class GivesCautions(Protocol):
    """A method that knows settings which are allowed and probably not meant."""

    def cautions(self, run: Training) -> Iterator[str]:
        """Yield a line for the console for each of them, before the first step."""
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
