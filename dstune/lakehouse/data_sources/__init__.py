"""Data sources of a lakehouse; one module per scheme."""
