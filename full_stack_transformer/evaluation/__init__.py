"""Model directory + dataset directory -> metrics. Knows nothing of training."""
