"""The ASGI application that clients reach. It accepts a fixed list of routes and fields, and nothing else."""
