"""`dstune synthesize`: rows that a teacher model writes, filtered, each with its provenance."""
