"""The packages of the wheel: every folder of `dstune/`, `conf/` as `dstune.conf`, and two packages that import nothing of
`dstune`. All else stands in pyproject.toml."""

from setuptools import find_packages, setup

setup(packages=[*find_packages(include=["dstune", "dstune.*"]), "dstune.conf", "dstune_plugins", "dstune_verify"])
