"""method=p_tuning: a trained prompt that comes out of a small network (Liu et al. 2021, arXiv:2103.10385)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any, ClassVar

from dstune.config.fields import setting
from dstune.methods._peft import TrainedPrompt, linear
from dstune.methods._peft.config import AdapterConfig
from dstune.protocols import method

if TYPE_CHECKING:
    from dstune.planning.architecture import Architecture


class PTuningEncoder(Enum):
    mlp = "mlp"
    lstm = "lstm"


@dataclass(frozen=True)
class PTuningConfig(AdapterConfig):
    """A trained prompt that a small network computes (Liu et al. 2021, arXiv:2103.10385).

    Like `prompt`, but easier to train. The network is not exported, so an export can be served but not trained further.
    """

    name: str = "p_tuning"
    virtual_tokens: int = setting(20, at_least=1)
    """Length of the trained prompt; it comes on top of `data.max_length`."""
    encoder: PTuningEncoder = PTuningEncoder.mlp
    """The network: three linear layers, or an LSTM in front of two."""
    encoder_size: int = setting(128, at_least=1)
    """Width of the network."""
    encoder_layers: int = setting(2, at_least=1)
    """Layers of the LSTM."""
    encoder_dropout: float = setting(0.0, at_least=0.0, below=1.0)
    """Dropout between the layers of the LSTM."""


@method
class PTuning(TrainedPrompt):
    Config = PTuningConfig
    config: PTuningConfig

    learning_rate = 1e-3

    peft_type = "P_TUNING"
    adapter_name = "P-tuning"
    renamed: ClassVar[dict[str, str]] = {"virtual_tokens": "num_virtual_tokens"}

    @property
    def added_length(self) -> int:
        return self.config.virtual_tokens

    def _through_network(self) -> bool:
        return True

    def _parameters(self, model: Architecture) -> Iterator[tuple[str, tuple[int, ...]]]:
        hidden, size = model.hidden, self.config.encoder_size
        yield "embedding.weight", self._embedding(model)
        if self.config.encoder is PTuningEncoder.mlp:
            yield from linear("mlp_head.0", hidden, size)
            yield from linear("mlp_head.2", size, size)
            yield from linear("mlp_head.4", size, hidden)
            return
        for layer in range(self.config.encoder_layers):
            inputs = hidden if layer == 0 else 2 * size
            for direction in ("", "_reverse"):
                at = f"l{layer}{direction}"
                yield f"lstm_head.weight_ih_{at}", (4 * size, inputs)
                yield f"lstm_head.weight_hh_{at}", (4 * size, size)
                yield f"lstm_head.bias_ih_{at}", (4 * size,)
                yield f"lstm_head.bias_hh_{at}", (4 * size,)
        yield from linear("mlp_head.0", 2 * size, 2 * size)
        yield from linear("mlp_head.2", 2 * size, hidden)

    def settings(self, task_type: Any) -> Any:
        from dstune.models.peft_import import peft

        return peft.PromptEncoderConfig(
            num_virtual_tokens=self.config.virtual_tokens,
            encoder_reparameterization_type=self.config.encoder.name.upper(),
            encoder_hidden_size=self.config.encoder_size,
            encoder_num_layers=self.config.encoder_layers,
            encoder_dropout=self.config.encoder_dropout,
            task_type=task_type,
        )
