"""Model directory + dataset directory -> figures. Knows nothing of training."""
