"""Writes the reference of an untuned language model: `python -m dstune.serve.base_reference MODEL FILE`.

It runs as a separate process because it needs torch, which the gateway does not import.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from dstune.core import files
from dstune.core.errors import EXIT_DONE, DstuneError, Problem, UserError, to_json


def main(model: dict[str, Any], file: Path) -> int:
    """Write the reference of a base model. model: its path and whether its code is trusted. Prints the error if no reference can be
    made."""
    from dstune.config.schema import ModelConfig
    from dstune.inference.reference import NoReference, base_reference

    try:
        try:
            reference = base_reference(ModelConfig(**model))
        except NoReference as error:
            raise UserError(Problem("--prove", str(error), "leave --prove out", model["path"])) from None
        files.write(file, json.dumps(reference, ensure_ascii=False) + "\n", mode=0o600)
    except DstuneError as error:
        print(json.dumps(to_json(error)))
        return error.exit_code
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1]), Path(sys.argv[2])))
