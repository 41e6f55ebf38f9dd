"""Sets a guard's thresholds, and measures what it detects and misses: `dstune guard calibrate` and `dstune guard test`."""
