"""Proof that the program behaves as before, from outside: command line, HTTP and files."""
