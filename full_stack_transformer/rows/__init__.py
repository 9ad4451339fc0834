"""Labelled rows: files, field names, splits, downloads. Knows nothing of tasks."""
