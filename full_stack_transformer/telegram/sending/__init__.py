"""How messages get to Telegram: calls, retries, pace."""
