"""The models that jobs make: named, listed, shared, served."""
