"""Stands for what ranks import."""

import multiprocessing.process  # noqa: F401

import numpy as np  # noqa: F401
