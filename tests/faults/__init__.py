"""Faults injected at every file system call of a command: what survives, and what is said."""
