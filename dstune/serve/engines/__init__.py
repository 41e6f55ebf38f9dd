"""What answers requests: processes behind one small interface (`base.py`)."""
