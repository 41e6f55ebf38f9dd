"""dstune's own engine for CPUs, small GPUs and tests: transformers in one process, with requests batched token by token.

The continuous batching of transformers 5.24 is no basis for it: it has no per-request seed, adapter or penalties, and its worker
ends for all requests if one exceeds the cache.
"""
