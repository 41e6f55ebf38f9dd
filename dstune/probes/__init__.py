"""Built-in probes: questions written for them (`questions/`), and rules that score the answers."""
