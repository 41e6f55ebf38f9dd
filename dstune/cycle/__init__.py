"""Training again from what people said of a served model's answers: `dstune cycle CONFIG`.

`settings.py` reads the file, `refusals.py` says what no cycle begins with, `collect.py` takes the rows that a person stood up for,
`training.py` trains from the current version with a share of old rows. `gates.py` compares the candidate with the current version
on the same rows, `verdicts.py` says what the differences show, and `decisions.py` what follows. `registry.py` keeps versions and
the shares of traffic that each gets, `ledger.py` every decision with its reason, and `steps.py` puts them in order: each step
leaves its result in a file, so that a cycle that was killed goes on behind the last one.
"""
