"""dstune's own engine for CPUs, small GPUs and tests: transformers in one process, with requests batched token by token.

`docs/decisions/text-generation.md` says why it does not stand on the continuous batching of transformers.
"""
