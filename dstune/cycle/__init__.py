"""Training again from what people said of a served model's answers: `dstune cycle CONFIG`.

`settings.py` reads the file, `collect.py` takes the rows that a person stood up for, `training.py` trains from the current
version with a share of old rows, `gates.py` holds the candidate against the current version on the same rows, `registry.py`
keeps versions and the shares of traffic that each gets, `ledger.py` every decision with its reason, and `steps.py` puts them in
order: each step leaves its result in a file, so that a cycle that was killed goes on behind the last one.
"""
