"""dstune: distributed fine-tuning of language models on DeepSpeed ZeRO, composed by Hydra."""

__version__ = "0.1.0"
