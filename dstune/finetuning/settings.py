"""Limits of the fine-tuning API."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ApiSettings:
    file_bytes: int = 512_000_000
    """Of a file that is uploaded in one request."""
    upload_bytes: int = 8_000_000_000
    """Of a file that is uploaded in parts."""
    part_bytes: int = 67_108_864
    project_bytes: int = 2_500_000_000_000
    """Of everything that a project stores: its files (equal ones once), parts of uploads, and folders of jobs with their models."""
    sweep_seconds: float = 60.0
    """Interval of removing what has expired."""
    store: str = ""
    """Where files are stored, as a URL of fsspec; empty for the server's own folder."""
    webhook_hosts: frozenset[str] = frozenset()
    """`HOST[:PORT]` or `http://HOST:PORT` in the operator's own network that webhooks may use."""
    delivery_seconds: float = 1.0
    """Interval of looking for events to send."""
