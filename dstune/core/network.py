"""What libraries would ask of the network by themselves."""

from __future__ import annotations

import os

LOOPBACK = ("127.0.0.1", "localhost", "::1")
METADATA_VARIABLE = "DSTUNE_CLOUD_METADATA"


def ask_no_metadata_service() -> None:
    """Keep the libraries of the clouds from looking for credentials at the machine's metadata address, which hangs where there
    is none; unless `DSTUNE_CLOUD_METADATA` asks for it, or the user's own setting."""
    if not os.environ.get(METADATA_VARIABLE):
        os.environ.setdefault("AWS_EC2_METADATA_DISABLED", "true")
        os.environ.setdefault("NO_GCE_CHECK", "true")
