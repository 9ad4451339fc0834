"""A small Telegram Bot API: a real HTTP server, as strict as Telegram, whose users are played by tests.

Start it with `python -m tests.fake_bot_api --port 0`; the first line of its output is its address.

    /bot<TOKEN>/<METHOD>   what a bot calls
    /user/...              what a test does as a user, reads back, or makes go wrong

`state` holds chats and updates, `checks` refuses what Telegram refuses, `methods` are the bot's,
`user_side` the user's routes, `server` joins them, `process` starts it for a test.
It knows nothing of the bot under test.
"""
