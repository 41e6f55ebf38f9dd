"""`python -m dstune.worker RUN_DIR`: a rank, by the name that launchers and the scripts of queued jobs start it."""

import sys

from dstune.rank.process import leave
from dstune.rank.worker import main

if __name__ == "__main__":
    leave(main(sys.argv[1:]))
