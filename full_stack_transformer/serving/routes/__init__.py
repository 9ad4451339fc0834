"""What each URL takes and answers. Knows no socket."""
