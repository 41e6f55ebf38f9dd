"""Fine-tuning jobs: created, queued, run in processes of their own, reconciled."""
