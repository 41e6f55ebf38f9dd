"""The built-in callbacks, a file each. They register on import, as those of plugins do, and import torch in functions only."""
