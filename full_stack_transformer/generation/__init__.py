"""Model directory + prompt -> text. Knows nothing of training and of HTTP."""
