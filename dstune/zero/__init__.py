"""DeepSpeed: its configuration, its engine, and every use of what it does not document."""
