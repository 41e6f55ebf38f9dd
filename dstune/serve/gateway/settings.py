"""Settings and limits of the gateway."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Settings:
    hosts: frozenset[str] = frozenset({"localhost", "127.0.0.1", "[::1]"})
    """Host names under which it may be called, without a port. Others are refused because of DNS rebinding."""
    origins: frozenset[str] = frozenset()
    """Other sites whose pages may call it; its own page always may."""
    max_body_bytes: int = 8 << 20
    key_body_bytes: int = 64 << 20
    """Bodies of a key's unanswered requests together; beyond it requests get 429."""
    all_body_bytes: int = 256 << 20
    """Bodies of all unanswered requests together."""
    body_seconds: float = 30.0
    """Time within which a body must arrive."""
    send_seconds: float = 120.0
    """A client that accepts no bytes for this long is disconnected."""
    max_depth: int = 64
    """Maximum nesting of JSON."""
    concurrent: int = 64
    """Requests that run on engines at once."""
    queue: int = 256
    """Requests that wait for a place; beyond it requests get 429."""
    queue_seconds: float = 60.0
    """A request that waited this long gets 503."""
    max_output_tokens: int = 131072
    """Output tokens of all answers to a request together."""
    feedback_bytes: int = 256 << 20
    """Stored feedback of a project."""
    adapter_roots: tuple[str, ...] = ()
    """Folders below which adapters may be added at run time."""
    aliases: Mapping[str, str] = field(default_factory=dict)
    """Further names of models: the model that answers, by the name that is requested."""
