"""A rank that forms its groups and sends an object: `group_ranks.py RANK WORLD STORE`; prints `received N`."""

import os
import sys
from datetime import timedelta

import torch.distributed as torch_dist

from dstune.core.distributed import World
from dstune.core.errors import TrainingFailed
from dstune.core.rank_env import RankEnv

rank, size, store = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
torch_dist.init_process_group(
    "gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=timedelta(seconds=60)
)
try:
    world = World(RankEnv(rank, size, rank, size, "environment"))
except TrainingFailed as error:
    print(f"refused: {error}", flush=True)
    os._exit(3)  # as ranks leave: a thread of gloo may outlive the interpreter, and the process aborts
print(f"received {len(world.gather(rank))}")
torch_dist.destroy_process_group()  # for the same reason
