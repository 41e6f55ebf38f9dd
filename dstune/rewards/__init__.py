"""Built-in rewards of `task=reinforcement`, by what they look at."""
