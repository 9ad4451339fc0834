"""Documents to start with: the interpreter's own documentation, and Nietzsche.

Read in this order: `collect` (the command), `documents` (what a document is, how its text is
tidied), `prose` (what counts as prose), `pages` (small texts to whole pages), `python_docs` with
`python_sources` and `python_builtins`, and `nietzsche`. Knows nothing of tokens and datasets.
"""
