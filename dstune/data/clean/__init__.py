"""Cleaning: what is changed in a row, which rows are left out, and the report of both."""
