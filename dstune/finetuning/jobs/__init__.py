"""Fine-tuning jobs: created, queued, run in separate processes, reconciled."""
