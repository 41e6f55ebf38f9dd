"""Whether the rows that a model is asked are still those that it was trained on: `dstune monitor`, `dstune data shift`.

`conversations.py` holds what is compared, one entry a conversation: turns of one conversation belong together, and tests
that take them for independent rows alarm without drift. `server_logs.py` and `row_files.py` read conversations, `vectors.py` and
`model_signals.py` measure them, `two_sample.py` tests all signals by shared permutations, `streams.py` looks for the moment
of a change, `power.py` says what could have been found, and `check.py` makes one verdict within one error budget (`budget.py`).
"""
