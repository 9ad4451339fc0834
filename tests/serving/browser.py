"""A real browser for the tests of the page, and what it saw.

Playwright drives the Chromium of the system; it downloads nothing.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

_NAMES = ("chromium", "chromium-browser", "google-chrome-stable", "google-chrome", "chrome")
_MISSING = (
    "NOT TESTED: the playground needs a browser; apt-get install chromium, or set FST_BROWSER"
)
# A browser starts in a second, but not on a machine that many share.
_TIMEOUT_MILLISECONDS = 120_000


def find_browser() -> str:
    """Path of a Chromium; skips the test where there is none."""
    found = os.environ.get("FST_BROWSER") or next(filter(None, map(shutil.which, _NAMES)), None)
    if found is None:
        pytest.skip(_MISSING)
    return found


@contextmanager
def running_browser() -> Iterator[Any]:
    """A headless Chromium without a window."""
    sync_api = pytest.importorskip(
        "playwright.sync_api", reason="NOT TESTED: pip install playwright"
    )
    path = find_browser()
    # Playwright looks for its driver and for Node there; nothing of this machine should change that.
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=path,
            # As in a container: no sandbox for root, and a small /dev/shm.
            chromium_sandbox=False,
            args=["--disable-dev-shm-usage", "--disable-gpu", "--disable-background-networking"],
            timeout=_TIMEOUT_MILLISECONDS,
        )
        sync_api.expect.set_options(timeout=_TIMEOUT_MILLISECONDS)
        yield browser
        browser.close()


@dataclass
class Visit:
    """One tab with a storage of its own, and what happened in it."""

    page: Any
    url: str
    problems: list[str] = field(default_factory=list)
    """Console errors and warnings, exceptions, dialogs of scripts."""
    hosts: set[str] = field(default_factory=set)
    """Whom the page asked for something."""

    def open(self) -> None:
        """Open the page, and wait until it knows the model."""
        self.page.goto(self.url)
        self.wait_until_ready()

    def wait_until_ready(self) -> None:
        """Models and parameters are there."""
        self.page.locator("body[data-ready=yes]").wait_for()

    def wait_until_saved(self) -> None:
        """What stands there is in the history."""
        self.page.locator("body[data-saved=yes]").wait_for()

    def wait_until_idle(self) -> None:
        """Nothing is being generated, and the figures of the last answer are there."""
        self.page.locator("body:not(.running) #state:not(:empty)").wait_for()

    def tokens(self, place: str = "#sheet") -> list[dict[str, Any]]:
        """The marks of the tokens of a text."""
        script = "all => all.map(one => one.mark)"
        found: list[dict[str, Any]] = self.page.locator(f"{place} .token").evaluate_all(script)
        return found

    def set_parameters(self, **values: object) -> None:
        """Type into the form."""
        self.page.locator(".more").evaluate("one => { one.open = true }")
        for name, value in values.items():
            self.page.locator(f"#parameter-{name}").fill(str(value))


@contextmanager
def visit(browser: Any, url: str, **options: Any) -> Iterator[Visit]:
    """A tab that has not been here before; what went wrong in it is a failure."""
    context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
    context.set_default_timeout(_TIMEOUT_MILLISECONDS)
    page = context.new_page()
    one = Visit(page, url)

    def on_console(message: Any) -> None:
        if message.type in ("error", "warning"):
            one.problems.append(message.text)

    def on_dialog(dialog: Any) -> None:
        one.problems.append(f"dialog: {dialog.message}")
        dialog.dismiss()

    page.on("console", on_console)
    page.on("pageerror", lambda error: one.problems.append(str(error)))
    page.on("dialog", on_dialog)
    page.on("request", lambda request: one.hosts.add(urlsplit(request.url).netloc))
    try:
        yield one
    finally:
        page.unroute_all(behavior="ignoreErrors")
        context.close()
    assert one.problems == []
    assert one.hosts - {""} <= {urlsplit(url).netloc}


CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def give_chat_template(model: Path) -> None:
    """Let a model directory be one of chats."""
    (model / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
