"""`/v1/batches`: files of requests, answered by the served models; batches continue after a restart."""
