"""Labelled rows: files, field names, splits, hub, downloads. Knows nothing of tasks."""
