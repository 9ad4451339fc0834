"""Files -> conversations and preferences, each checked. Knows nothing of tokens."""
