"""The server's database: keys, answers and feedback. SQLite by default, PostgreSQL by its URL."""
