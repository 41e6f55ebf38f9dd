"""`python -m dstune.launch.slurm_job`: the name by which scripts that an earlier version put into the queue call
`dstune.launch.slurm.job`."""

import sys

from dstune.launch.slurm.job import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
