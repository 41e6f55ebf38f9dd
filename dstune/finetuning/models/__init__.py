"""The models that jobs create: their names, listing, sharing and serving."""
