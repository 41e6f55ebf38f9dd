"""The engine of dstune itself, for CPUs, small GPUs and tests: transformers in a process, requests batched token by token.

Not built on the continuous batching of transformers 5.24: it has no seed, no adapter and no penalties of a single request,
and a request longer than its cache ends the worker for all.
"""
