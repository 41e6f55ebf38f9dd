"""`python -m dstune`, and the module for `deepspeed --no_local_rank --module dstune train ...`."""

import sys

from dstune.cli import main

if __name__ == "__main__":
    sys.exit(main())
