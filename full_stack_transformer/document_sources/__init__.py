"""Ready-made documents and labelled rows: the interpreter's own documentation, and Nietzsche.

Read in this order: `collect` (the command), `documents` (what a document is), `python_docs` with
`python_sources`, and `nietzsche`; for labelled rows `task_rows`. `demo` runs all commands. Knows nothing of
tokens and datasets.
"""
