"""Detects whether the requests to a model still resemble its training rows: `dstune monitor`, `dstune data shift`.

`conversations.py` defines the unit of comparison, a conversation: its turns belong together, and tests that treat them as
independent rows raise false alarms. `server_logs.py` and `row_files.py` read conversations, `vectors.py` and `model_signals.py`
measure them, `two_sample.py` tests all signals with shared permutations, `streams.py` finds the moment of a change, `power.py`
states what could have been detected, and `check.py` reaches one verdict within one error budget (`budget.py`).
"""
