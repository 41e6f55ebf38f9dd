"""`python -m dstune.launch.slurm_job`: by this name the scripts of SLURM jobs call `dstune.launch.slurm.job`, those in the
queue too."""

import sys

from dstune.launch.slurm.job import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
