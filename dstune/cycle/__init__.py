"""Trains a served model again from people's feedback on its answers: `dstune cycle CONFIG`.

`settings.py` reads the configuration, and `refusals.py` checks what must hold before a cycle begins. `collect.py` collects the rows
that a person has confirmed, and `training.py` trains from the current version with a share of old rows. `gates.py` compares the
candidate with the current version on the same rows, `dstune/grading/verdicts.py` says what the differences show, and
`decisions.py` what follows.
`registry.py` keeps the versions and the share of traffic that each gets, and `ledger.py` records every decision with its reason.
`steps.py` runs the steps in order: each leaves its result in a file, so that a killed cycle continues after its last finished step.
"""
