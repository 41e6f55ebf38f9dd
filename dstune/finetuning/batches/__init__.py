"""`/v1/batches`: files of requests, answered by the models that are served, and found again after a restart."""
