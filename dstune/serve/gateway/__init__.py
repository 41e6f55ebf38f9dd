"""What clients reach: an ASGI application that lets through a list of routes and fields, and nothing else."""
