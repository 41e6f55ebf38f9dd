"""Sweeps: several runs of one configuration with other values, each started through the launch layer."""
