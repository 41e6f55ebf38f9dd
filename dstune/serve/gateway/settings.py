"""What the gateway allows."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    hosts: frozenset[str] = frozenset({"localhost", "127.0.0.1", "[::1]"})
    """Names under which it may be called, without a port: a page elsewhere could reach it under a name of its own
    (DNS rebinding)."""
    origins: frozenset[str] = frozenset()
    """Other sites whose pages may call it; its own page may."""
    max_body_bytes: int = 8 << 20
    key_body_bytes: int = 64 << 20
    """Of all bodies of a key's requests that are not answered yet; more get 429."""
    all_body_bytes: int = 256 << 20
    """Of all requests."""
    body_seconds: float = 30.0
    """A body has to be there by then."""
    send_seconds: float = 120.0
    """A client that takes no more bytes for so long is cut off."""
    max_depth: int = 64
    """Of JSON."""
    concurrent: int = 64
    """Requests that engines work on."""
    queue: int = 256
    """Requests that wait for one of these places; more get 429."""
    queue_seconds: float = 60.0
    """A request that waited so long gets 503."""
    max_output_tokens: int = 131072
    """Of all answers to a request together."""
    feedback_bytes: int = 256 << 20
    """Of what a project has said of its answers."""
    adapter_roots: tuple[str, ...] = ()
    """Folders below which adapters may be added while the server runs."""
