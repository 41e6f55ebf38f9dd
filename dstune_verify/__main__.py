"""`python -m dstune_verify`, and what the one-file build runs."""

import sys

from dstune_verify.command import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
