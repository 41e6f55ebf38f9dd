"""Builds the pattern of a tokenizer's control tokens by the rule used in training (`data/control.py`).

It runs as a separate process because it needs transformers, which the gateway does not import. It reads the tokenizer's folder from
standard input.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from dstune.core.errors import first_line


def pattern_of(folder: Path, *, trust_remote_code: bool) -> dict[str, Any]:
    """Return the pattern of the control tokens of the tokenizer in `folder`. Raises OSError, ValueError if the folder holds no
    tokenizer."""
    from dstune.core.tokenizers import open_tokenizer
    from dstune.data.control import ControlTokens

    tokenizer = open_tokenizer(folder, where="model", local_files_only=True, trust_remote_code=trust_remote_code)
    pattern = ControlTokens(tokenizer).pattern
    return {"pattern": pattern.pattern, "ignore_case": bool(pattern.flags & re.IGNORECASE)}


def main() -> int:
    request = json.loads(sys.stdin.readline())
    try:
        answer = pattern_of(Path(request["folder"]), trust_remote_code=request["trust_remote_code"])
    except Exception as error:  # files or code of a tokenizer may raise anything
        answer = {"error": first_line(error)}
    print(json.dumps(answer))
    return 0


if __name__ == "__main__":
    sys.exit(main())
