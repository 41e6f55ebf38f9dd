"""Sweeps: runs of one configuration with different values, each started through the launch layer."""
