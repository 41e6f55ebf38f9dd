"""The packages of the wheel: every folder of `dstune/`, and `conf/` as `dstune.conf`. All else stands in pyproject.toml."""

from setuptools import find_packages, setup

setup(packages=[*find_packages(include=["dstune", "dstune.*"]), "dstune.conf", "dstune_plugins"])
