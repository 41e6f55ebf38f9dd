"""Cleaning: change the texts of rows, leave rows out, and report both."""
