"""What the bot says: whose turn it is, texts while they are made, finished replies."""
