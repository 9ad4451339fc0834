"""Text <-> token ids: built-in tokenizers, your own, encoders, checking one. Knows nothing of documents."""
