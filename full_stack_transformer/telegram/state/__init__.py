"""What survives the process: the SQLite database, and what it holds."""
