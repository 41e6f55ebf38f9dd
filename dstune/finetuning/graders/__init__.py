"""Graders of `dstune.grading` over HTTP."""
