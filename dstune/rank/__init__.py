"""Entry points of a rank, from top to bottom: set-up, start, training and end; and the measurements that need ranks."""
