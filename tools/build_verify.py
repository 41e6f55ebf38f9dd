"""Build dstune-verify as one file that needs torch alone: `python tools/build_verify.py build/dstune-verify.pyz`.

The file is the same, byte for byte, for the same sources: the digest of a release can be compared.
"""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "dstune_verify"
SHEBANG = b"#!/usr/bin/env python3\n"
MAIN = "import sys\nfrom dstune_verify.command import main\nsys.exit(main(sys.argv[1:]))\n"
TIME = (2020, 1, 1, 0, 0, 0)


def build(target: Path) -> None:
    """Write the package into a zip file that Python runs."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("wb") as file:
        file.write(SHEBANG)
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            for path in sorted(PACKAGE.glob("*.py")):
                archive.writestr(zipfile.ZipInfo(f"{PACKAGE.name}/{path.name}", TIME), path.read_bytes())
            archive.writestr(zipfile.ZipInfo("__main__.py", TIME), MAIN)
    target.chmod(0o755)


if __name__ == "__main__":
    build(Path(sys.argv[1]))
