"""`dstune import`: configurations of axolotl, LLaMA-Factory, ms-swift and TRL as experiments. One table for each tool."""
