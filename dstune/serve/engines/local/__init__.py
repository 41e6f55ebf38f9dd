"""dstune's own engine for CPUs, small GPUs and tests: transformers in one process, with requests batched token by token. It is not
built on the continuous batching of transformers 5.24, which has no per-request seed, adapter or penalties, and whose worker ends
for all requests if one exceeds the cache."""
