"""Says what it is, for `distributed/test_warm_start.py`."""

import os
import resource
import signal
import sys
import tempfile
import time

warm = "warm" if "torch" in sys.modules else "cold"
if sys.argv[1] == "inherit":
    ignored = signal.getsignal(signal.SIGUSR1) is signal.SIG_IGN
    limit = resource.getrlimit(resource.RLIMIT_CORE)
    stdout_class = type(sys.stdout.buffer).__name__
    print(os.sched_getaffinity(0), os.umask(0), ignored, stdout_class, limit, tempfile.gettempdir(), warm, sep="|")
    sys.exit()
print(os.getppid(), os.getcwd(), os.environ["DSTUNE_SIGN"], os.getpid(), warm, sep="|", flush=True)
if sys.argv[1] == "wait":
    time.sleep(60)
if sys.argv[1] == "exit":
    print("out")
    sys.exit(7)
raise RuntimeError("as asked")
