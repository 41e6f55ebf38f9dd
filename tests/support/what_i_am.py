"""Says what it is, for `distributed/test_warm_start.py`."""

import os
import sys
import time

print(
    os.getppid(),
    os.getcwd(),
    os.environ["DSTUNE_SIGN"],
    os.getpid(),
    "warm" if "torch" in sys.modules else "cold",
    sep="|",
    flush=True,
)
if sys.argv[1] == "wait":
    time.sleep(60)
if sys.argv[1] == "exit":
    print("out")
    sys.exit(7)
raise RuntimeError("as asked")
