"""Documents -> dataset directory -> samples -> batches. Knows nothing of models."""
