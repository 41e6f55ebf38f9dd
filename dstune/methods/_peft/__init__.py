"""Base classes of methods that use peft: they train a few new parameters and freeze the model's weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

from dstune.config.convert import format_value
from dstune.config.schema import InitialWeights, RunConfig
from dstune.core.errors import Problem
from dstune.methods._peft.config import AdapterConfig, ModuleAdapterConfig
from dstune.protocols import Method, task_of
from dstune.protocols.method import MethodConfig
from dstune.protocols.method_options import MergesAdapter, PutsPositionsInFront, StartsFromAdapters

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

    from dstune.planning.architecture import Architecture, Tensor

HEADS = ("classifier", "score")
"""Modules of a new head; peft trains a copy of them."""


class Adapter(Method, StartsFromAdapters):
    """Base of every method that uses peft."""

    adapter = True
    config: AdapterConfig

    peft_type: ClassVar[str]
    """peft's name for this kind of adapter."""
    renamed: ClassVar[dict[str, str]] = {}
    """peft's names of keys that have another name in dstune, by the name in dstune."""
    ours_alone: ClassVar[tuple[str, ...]] = ()
    """Keys that do not describe an adapter's form, so that its settings do not have them."""
    trains_tokens: ClassVar[bool] = False
    """Whether it can train the rows of tokens that were added to the vocabulary."""

    @property
    def folders(self) -> list[str]:
        return [] if self.config.adapter is None else [self.config.adapter]

    def resolve(self) -> MethodConfig:
        from dstune.methods._peft.files import with_settings_of

        return with_settings_of(self.config, self.peft_type, self.renamed, ("name", "adapter", *self.ours_alone))

    def added(self, model: Architecture) -> tuple[Tensor, ...]:
        """Return the tensors that the adapter adds, from the configuration alone."""
        raise NotImplementedError

    def trained(self, model: Architecture) -> tuple[tuple[Tensor, ...], int]:
        trained_names = {*HEADS, *self._trained_whole()}
        whole = [tensor for tensor in model.tensors if trained_names & set(tensor.name.split("."))]
        # peft trains a copy of a whole module beside the frozen original.
        return (*self.added(model), *whole), model.parameters

    def _trained_whole(self) -> list[str]:
        return []

    def apply(self, model: PreTrainedModel, run: RunConfig) -> nn.Module:
        import torch

        from dstune.methods._peft.apply import finish, refuse_tokens

        torch.manual_seed(run.trainer.seed)  # the adapters' first weights, the same on every rank
        if not self.trains_tokens:
            refuse_tokens(self.name, model)
        return finish(self.config, self.add(model, run), model)

    def add(self, model: PreTrainedModel, run: RunConfig) -> nn.Module:
        """Return the model with a new adapter, before it takes values from `method.adapter`."""
        raise NotImplementedError

    def without_paths(self, public_name: Callable[[str], str]) -> MethodConfig:
        name = self.config.adapter
        return self.config if name is None else replace(self.config, adapter=public_name(name))


class ModuleAdapter(Adapter, MergesAdapter):
    """Base of methods that put adapters on modules of the model."""

    merges = True
    config: ModuleAdapterConfig

    def check(self, run: RunConfig) -> Iterator[Problem]:
        modules = self.config.target_modules
        if not modules and not self._has_own_choice():
            fix = "method.target_modules=[all-linear], or module names such as [q_proj,v_proj]"
            yield Problem("method.target_modules", "no module would get an adapter", fix, "[]")
        if "all-linear" in modules and len(modules) > 1:
            yield Problem(
                "method.target_modules", "all-linear stands alone", "leave out the other names", format_value(modules)
            )

    def _has_own_choice(self) -> bool:
        """Return whether peft chooses modules if the configuration names none."""
        return False

    @property
    def targets(self) -> list[str]:
        return list(self.config.target_modules) or ["all-linear"]

    def _trained_whole(self) -> list[str]:
        return list(self.config.modules_to_save)

    def add(self, model: PreTrainedModel, run: RunConfig) -> nn.Module:
        from dstune.methods._peft.apply import adapt, common_settings

        return adapt(model, self.settings(common_settings(self.config, model, run)), self.refused_by_peft, [], run)

    def settings(self, common: dict[str, Any]) -> Any:
        """Return peft's configuration. common: the arguments shared by all adapters on modules."""
        raise NotImplementedError

    def refused_by_peft(self, reason: str) -> Problem:
        fix = "method.target_modules=[all-linear], or endings of names of linear layers of the model"
        return Problem("method.target_modules", reason, fix, str(self.config.target_modules))


class TrainedPrompt(Adapter, PutsPositionsInFront):
    """Base of methods that train positions in front of the row and leave the model's weights unchanged."""

    in_front = True
    why_not_shared_rows = "its trained positions stand in front of the whole row"

    @property
    def positions(self) -> int:
        count: int = self.config.virtual_tokens  # type: ignore[attr-defined]
        return count

    def check(self, run: RunConfig) -> Iterator[Problem]:
        name = self.name
        if not task_of(run.task).prefix_positions_ok:
            reason = f"task={run.task.name} reads the positions of the row, and those of a trained prompt come in front of them"
            yield Problem("method", reason, "method=lora", name)
        if run.data.packing:
            reason = (
                "the trained prompt stands once in front of a row, so packed samples behind the first would have none"
            )
            yield Problem("data.packing", f"with method={name} {reason}", "data.packing=false", "true")
        if run.model.weights is InitialWeights.random:
            reason = f"what method={name} trains is exported beside its base, and random weights exist nowhere else"
            yield Problem("model.weights", reason, "model.weights=pretrained, or method=full", "random")
        if self._through_network() and self.config.adapter:
            reason = "an export holds what the network gives, and the network itself cannot be had from it"
            fix = "continue the run itself: dstune train RUN"
            yield Problem("method.adapter", reason, fix, format_value(self.config.adapter))

    def _through_network(self) -> bool:
        """Return whether a network computes the prompt. The export has only its result, not the network."""
        return False

    def encoder_decoder_problem(self, kind: str) -> Problem | None:
        reason = f"{kind} is an encoder-decoder, and which of its parts a trained prompt stands before is not settled"
        return Problem("method", reason, "method=lora", self.name)

    def added(self, model: Architecture) -> tuple[Tensor, ...]:
        from dstune.planning.architecture import Tensor

        return tuple(Tensor(f"prompt_encoder.{name}", shape) for name, shape in self._parameters(model))

    def _parameters(self, model: Architecture) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Yield name and shape of each parameter of the prompt and of the network that computes it."""
        raise NotImplementedError

    def _embedding(self, model: Architecture) -> tuple[int, int]:
        """Return the shape of the prompt. An encoder-decoder has one for its encoder and one for its decoder."""
        return self.positions * (2 if model.encoder_decoder else 1), model.hidden

    def add(self, model: PreTrainedModel, run: RunConfig) -> nn.Module:
        from dstune.methods._peft.apply import task_type
        from dstune.methods._peft.prompts import add_prompt

        adapted = add_prompt(self.name, self.settings(task_type(run, model)), self.positions, model, run)
        if model.device.type != "meta":
            self.start(adapted, run)
        return adapted

    def settings(self, task_type: Any) -> Any:
        """Return peft's configuration."""
        raise NotImplementedError

    def start(self, adapted: Any, run: RunConfig) -> None:
        """Set the first values of the prompt; peft's own by default. Every rank must call it."""


def linear(name: str, inputs: int, outputs: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield name and shape of the weight and the bias of a linear layer."""
    yield f"{name}.weight", (outputs, inputs)
    yield f"{name}.bias", (outputs,)
