"""Text <-> token ids: tokenizers, encoders, checks of a tokenizer. Knows nothing of documents."""
