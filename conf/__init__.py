"""Hydra's configuration groups, installed as the package `dstune.conf`."""
