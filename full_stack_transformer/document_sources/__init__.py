"""Ready-made documents and labelled rows: the interpreter's own documentation, Nietzsche, packages.

Read in this order: `collect` (the command), `documents` (what a document is), `python_docs` with
`python_sources`, `nietzsche` and `package_descriptions`; for labelled rows `task_rows` with
`python_questions`. `demo` and `demo_chat` run all commands, by `demo_steps`. Knows nothing of tokens and
datasets.
"""
