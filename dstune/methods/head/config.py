"""The keys of `method=head`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from dstune.config.fields import setting
from dstune.methods._pooled import Pooling
from dstune.protocols.method import MethodConfig


@dataclass(frozen=True)
class HeadConfig(MethodConfig):
    """Only the task's head is trained; the body stays frozen.

    Use it for few rows, or if the body already knows the language of the task well. The body has no backward pass. Every epoch
    runs the body again, with dropout; `method=features` runs it once. Unless `method.pooling` is `model`, the
    export contains the head's code (`modeling_dstune.py`): dstune loads it directly, transformers needs
    `trust_remote_code=True`.
    """

    needs: ClassVar[str] = "task=classification"
    name: str = "head"
    pooling: Pooling = Pooling.model
    """What the head reads: `cls` the first token, `mean` of all, `last` token; `model` is the architecture's own head."""
    layers: int = setting(0, at_least=0)
    """Dense layers between pooling and classes."""
    dropout: float = setting(0.0, at_least=0.0, below=1.0)
    """Dropout in front of each layer of the head."""
