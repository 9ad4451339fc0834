"""Model directory -> HTTP API: schemas, client, engine worker, app. Knows nothing of training."""
