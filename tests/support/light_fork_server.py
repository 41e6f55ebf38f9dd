"""The fork server without the imports of ranks, which take seconds: `warm.SERVER` of `unit/test_fork_server.py`."""

import importlib
import sys
from collections.abc import Sequence

from dstune.launch.local import fork_server


def import_modules(further: Sequence[str]) -> None:
    for module in filter(None, further):
        importlib.import_module(module)


if __name__ == "__main__":
    fork_server.import_modules = import_modules
    fork_server.main(sys.argv[1:])
