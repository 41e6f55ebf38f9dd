"""`dstune import`: configurations of axolotl, LLaMA-Factory, ms-swift and TRL as experiments, and half-finished runs of
transformers' Trainer as runs. Each tool has a table of its keys."""
