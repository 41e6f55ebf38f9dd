"""`dstune import`: configurations of axolotl, LLaMA-Factory and TRL as experiments. One table for each tool."""
