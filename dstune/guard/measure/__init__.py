"""What a guard's thresholds are set from, and what it catches and misses: `dstune guard calibrate` and `dstune guard test`."""
