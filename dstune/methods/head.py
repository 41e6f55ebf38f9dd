"""method=head: only the task's head is trained; the body stays frozen."""

from __future__ import annotations

from dstune.config.method_schema import HeadConfig
from dstune.protocols import Method, method


@method
class Head(Method):
    Config = HeadConfig
    config: HeadConfig
