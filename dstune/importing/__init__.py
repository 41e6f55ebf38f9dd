"""`dstune import`: configurations of axolotl, LLaMA-Factory, ms-swift and TRL as experiments. Each tool has a table of its keys."""
