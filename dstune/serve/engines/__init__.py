"""Engines: processes that answer requests, behind one small interface (`base.py`)."""
