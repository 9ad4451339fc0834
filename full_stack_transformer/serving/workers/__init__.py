"""The threads that compute, and the models that they own. Knows nothing of HTTP."""
