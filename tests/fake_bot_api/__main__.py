"""`python -m tests.fake_bot_api --port 0`: serve until SIGTERM; the first line is the URL."""

import argparse
import asyncio
import signal

from aiohttp import web

from tests.fake_bot_api.server import make_app

_DEFAULT_TOKEN = "42:FAKE-token_of-the-only-bot"


async def serve(host: str, port: int, token: str, *, with_limits: bool) -> None:
    """Serve until SIGTERM or SIGINT."""
    # A poll whose bot has died ends at once, as at Telegram, and holds up nothing at the end.
    runner = web.AppRunner(
        make_app(token, with_limits=with_limits),
        access_log=None,
        handler_cancellation=True,
        shutdown_timeout=0.1,
    )
    await runner.setup()
    await web.TCPSite(runner, host, port).start()
    host, port = runner.addresses[0][:2]
    print(f"http://{host}:{port}", flush=True)
    stopped = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    await stopped.wait()
    await runner.cleanup()


def main() -> None:
    """Read the options and serve."""
    parser = argparse.ArgumentParser(description="A small Telegram Bot API for tests")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8081, help="0 for any free one")
    parser.add_argument("--token", default=_DEFAULT_TOKEN, help="of the only bot that is known")
    parser.add_argument(
        "--no_limits", action="store_true", help="chats take any number of messages"
    )
    options = parser.parse_args()
    asyncio.run(serve(options.host, options.port, options.token, with_limits=not options.no_limits))


if __name__ == "__main__":
    main()
