"""Prove that an installed training stack computes the right gradients, without installing anything.

The package needs torch alone and imports DeepSpeed, transformers and peft only where it finds them, so that it runs inside the
environment that it judges. `python -m dstune_verify`, `torchrun -m dstune_verify` and the one-file build `dstune-verify.pyz` are
the same program; `dstune verify` starts it for a configuration of dstune.
"""

VERSION = 1
"""Version of the cases and of the certificate. Certificates of different versions do not list the same cases."""
