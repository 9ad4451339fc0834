"""HTTP API -> Telegram bot. Talks to a service over HTTP and never imports torch."""
