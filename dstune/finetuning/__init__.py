"""OpenAI's fine-tuning API over dstune: files, uploads, jobs, graders, batches and webhooks, on the gateway of `dstune serve`.

`routes.py` is the table of routes, `service.py` what they share, `tables.py` what the database keeps of it.
"""
