"""What the fine-tuning API allows."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ApiSettings:
    file_bytes: int = 512_000_000
    """Of a file that is uploaded at once."""
    upload_bytes: int = 8_000_000_000
    """Of one that comes in parts."""
    part_bytes: int = 67_108_864
    project_bytes: int = 2_500_000_000_000
    """Of all that a project stores: its files, equal ones counted once, parts of uploads, folders of jobs with their models."""
    sweep_seconds: float = 60.0
    """Between two looks for what has expired."""
    store: str = ""
    """Where the bytes of files lie, by a URL of fsspec; empty for the server's own folder."""
    webhook_hosts: frozenset[str] = frozenset()
    """`HOST[:PORT]` or `http://HOST:PORT` of the operator's own network that webhooks may name."""
    delivery_seconds: float = 1.0
    """Between two looks for events to be sent."""
