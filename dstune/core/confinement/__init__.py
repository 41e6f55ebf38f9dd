"""Confines the work of strangers: chat templates, patterns, images, rewards, programs that are judged.

`table.py` has the limits of each. Four modules apply them:

- `inside.py` limits the process that it runs in. All others use it. `system_calls.py` is its filter of system calls.
- `here.py` runs frequent work in this process (a template for one row), or tries it once in a fork of this process that can be
  killed.
- `spawned.py` runs work in processes that are started for it, hold nothing of this process's memory, answer requests and can be
  killed: images, rewards, a template for a thread.
- `dstune/grading/sandbox.py` runs a program in namespaces of its own, without the machine's files, in a control group
  (`control_group.py`) where it can.
"""
