"""The Python API of `import dstune`: training, trained models and runs, on the same layers as the command line."""
