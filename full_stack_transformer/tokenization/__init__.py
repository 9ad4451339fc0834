"""Text <-> token ids: tokenizers, encoders, checks of a tokenizer, chats. Knows nothing of documents."""
