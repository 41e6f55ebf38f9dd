"""DeepSpeed: its configuration, its engine, and every use of its undocumented parts."""
