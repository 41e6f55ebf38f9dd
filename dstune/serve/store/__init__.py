"""What a server remembers: keys, answers and what was said of them. SQLite by default, PostgreSQL by its URL."""
