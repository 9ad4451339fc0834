"""Connections, keys, limits, logs and metrics of the service. Knows no model."""
