"""The base of all other rooms: it imports no Hydra and no task or method, and the launching side's modules no torch."""
