"""`python -m dstune.worker RUN_DIR`: a rank, by the name that launchers and the scripts of queued jobs start it."""

import sys

from dstune.core.rank_env import hold_notices

hold_notices()  # before the imports, which take seconds

from dstune.rank.process import exit_now  # noqa: E402
from dstune.rank.worker import main  # noqa: E402

if __name__ == "__main__":
    exit_now(main(sys.argv[1:]))
