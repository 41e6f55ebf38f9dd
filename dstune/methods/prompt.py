"""method=prompt: trained token embeddings in front of every row (Lester et al. 2021, arXiv:2104.08691)."""

from __future__ import annotations

from dstune.config.method_schema import PromptConfig
from dstune.protocols import Method, method


@method
class Prompt(Method):
    Config = PromptConfig
    config: PromptConfig
