"""What `import dstune` offers: training, trained models and runs from Python, on the same layers as the command line."""
