"""`python -m dstune.samples`: the same as `dstune samples`."""

import sys

from dstune.samples import main

sys.exit(main(sys.argv[1:]))
