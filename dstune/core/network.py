"""Keeps libraries from network requests that nobody asked for."""

from __future__ import annotations

import os

LOOPBACK = ("127.0.0.1", "localhost", "::1")
METADATA_VARIABLE = "DSTUNE_CLOUD_METADATA"


def ask_no_metadata_service() -> None:
    """Keep cloud libraries from looking for credentials at the machine's metadata address: outside of a cloud, that request hangs.

    `DSTUNE_CLOUD_METADATA`, and the user's own settings of these libraries, take precedence.
    """
    if not os.environ.get(METADATA_VARIABLE):
        os.environ.setdefault("AWS_EC2_METADATA_DISABLED", "true")
        os.environ.setdefault("NO_GCE_CHECK", "true")
