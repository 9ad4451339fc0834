"""Updates from Telegram: received, understood, recorded as jobs."""
