"""Built-in probes: their questions (`questions/`), and rules that score the answers."""
