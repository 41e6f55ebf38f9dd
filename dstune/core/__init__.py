"""What everything else stands on: no torch, no Hydra, no room of a task or method is known here."""
