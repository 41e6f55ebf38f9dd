"""Lets llama.cpp write the K types of GGUF: `python -m dstune.checkpoint.llama_quantize FROM TO NUMBER`.

This runs in a separate process, since llama.cpp aborts its process if it cannot handle a file.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from dstune.core.child_python import child_environment
from dstune.core.errors import Problem, UserError


def write_k_type(plain: Path, file: Path, kind: str) -> None:
    """Quantize the unquantized GGUF file `plain` to `file` in the K type `kind`. Raises UserError if llama.cpp refuses."""
    from dstune.checkpoint.gguf_file import file_type

    command = [sys.executable, "-m", __name__, str(plain), str(file), str(file_type(kind))]
    done = subprocess.run(
        command, env=child_environment(), capture_output=True, text=True, errors="replace", check=False
    )
    if done.returncode or not file.is_file():
        lines = [line for line in done.stderr.splitlines() if "error" in line.lower() or "assert" in line.lower()]
        reason = lines[-1].strip() if lines else f"it ended with exit code {done.returncode}"
        raise UserError(Problem("--quantize", f"llama.cpp cannot write this type: {reason}", "another type", kind))


def main(plain: str, file: str, number: str) -> int:
    """Quantize `plain` to `file` in llama.cpp's type `number`; return llama.cpp's exit code, 0 if it wrote the file."""
    import ctypes

    import llama_cpp

    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = int(number)
    return int(llama_cpp.llama_model_quantize(plain.encode(), file.encode(), ctypes.byref(settings)))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
