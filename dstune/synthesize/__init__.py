"""`dstune synthesize`: rows that a teacher writes, filtered, each with where it came from."""
