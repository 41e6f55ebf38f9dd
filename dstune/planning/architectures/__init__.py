"""Families of models, a file each: their tensors in the order of `named_parameters()`."""
