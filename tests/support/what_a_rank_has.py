"""A rank that prints, as JSON, what it has of the process that started it, and then does as its arguments say."""

import json
import multiprocessing
import os
import random
import resource
import signal
import sys
import tempfile
import time

from dstune.core.rank_env import die_with_parent

if "careless" not in sys.argv:
    die_with_parent()
LIMITS = [number for name, number in vars(resource).items() if name.startswith("RLIMIT_")]
descriptors = {}
for number in os.listdir("/proc/self/fd"):
    try:
        descriptors[number] = os.readlink(f"/proc/self/fd/{number}")
    except OSError:
        continue
same = {
    "variables": dict(os.environ),
    "arguments": sys.argv[1:],
    "path": sys.path,
    "cwd": os.getcwd(),
    "umask": os.umask(0),
    "affinity": sorted(os.sched_getaffinity(0)),
    "nice": os.nice(0),
    "limits": [resource.getrlimit(number) for number in LIMITS],
    "signals": {number: str(signal.getsignal(number)) for number in sorted(signal.valid_signals())},
    "blocked": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, ())),
    "descriptors": sorted(descriptors, key=int),
    "temporary": tempfile.gettempdir(),
    "leads its session": os.getsid(0) == os.getpid() == os.getpgid(0),
    "module": sys.modules["__main__"].__spec__.name,
    "loaded before": "support.slow_import" in sys.modules,
    "zone": time.tzname[0],
}
own = {
    "pid": os.getpid(),
    "random": random.random(),
    "key": multiprocessing.current_process().authkey.hex(),
    "drawn": sys.modules["numpy"].random.random() if "numpy" in sys.modules else None,
    "parent": os.getppid(),
}
print(json.dumps([same, own]), flush=True)
print("to stderr", file=sys.stderr, flush=True)
if "sleep" in sys.argv:
    time.sleep(60)
if "raise" in sys.argv:
    raise RuntimeError("as asked")
sys.exit(7)
