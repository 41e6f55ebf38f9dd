"""The keys of `method=freeze`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from dstune.config.fields import setting
from dstune.protocols.method import MethodConfig


@dataclass(frozen=True)
class FreezeConfig(MethodConfig):
    """Some weights are frozen: embeddings, layers, or the parameters whose names match a regular expression.

    Between `head` and `full`: frozen weights need no gradients or optimizer states, and keep every bit.
    """

    needs: ClassVar[str] = "method.first_layers=4"
    name: str = "freeze"
    embeddings: bool = False
    """Freeze what is below the first layer: token and position embeddings, a tied vocabulary projection."""
    first_layers: int = setting(0, at_least=0, example="4")
    """Freeze this many layers from the bottom."""
    last_layers: int = setting(0, at_least=0)
    """Freeze this many layers from the top."""
    parameters: list[str] = setting([])
    """Freeze the parameters whose name matches one of these regular expressions: `[mlp, 'layers\\.[0-3]\\.']`."""
    trained: list[str] = setting([])
    """Regular expressions for parameters that are trained although other keys freeze them: `[norm, bias$]`."""
    layer_decay: float = setting(1.0, above=0.0, at_most=1.0)
    """Rate of a layer as a share of that of the layer above it; 1 is one rate for all."""
