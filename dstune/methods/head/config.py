"""The keys of `method=head`."""

from __future__ import annotations

from dataclasses import dataclass

from dstune.config.fields import setting
from dstune.methods._pooled import Pooling
from dstune.protocols.method import MethodConfig


@dataclass(frozen=True)
class HeadConfig(MethodConfig):
    """Only the task's head is trained; the body stays frozen.

    For few rows, or a body that knows the task's language well already. The body runs forward only; every epoch runs it
    again, with dropout, which `features` does not. A head with a pooling of its own is exported with its code
    (`modeling_dstune.py`): dstune loads it as it is, plain transformers with `trust_remote_code=True`.
    """

    name: str = "head"
    pooling: Pooling = Pooling.model
    """What the head reads: `cls` the first token, `mean` of all, `last` token; `model` is the architecture's own head."""
    layers: int = setting(0, at_least=0)
    """Dense layers between pooling and classes."""
    dropout: float = setting(0.0, at_least=0.0, below=1.0)
    """Dropout in front of each layer of the head."""
