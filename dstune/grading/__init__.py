"""Graders of OpenAI's fine-tuning API, and the sandbox that programs run in which nobody here has written."""
