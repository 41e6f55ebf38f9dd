"""Helpers shared by the tests: tiny models and data, and real ranks."""
