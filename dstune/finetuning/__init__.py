"""OpenAI's fine-tuning API for dstune: files, uploads, jobs, graders, batches and webhooks, on the gateway of `dstune serve`.

`routes.py` is the table of routes, `service.py` holds what they share, `tables.py` defines the database tables.
"""
