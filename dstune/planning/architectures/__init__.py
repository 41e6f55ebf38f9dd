"""Families of models, one file each: their tensors in the order of `named_parameters()`."""
