"""The files of the page: what is sent, with which headers, to whom; no browser needed."""

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import httpx
import pytest

from full_stack_transformer.serving.app import playground_files
from tests.serving.conftest import KeyedService

FILES = playground_files()
DIRECTORY = Path(__file__).parents[2] / "full_stack_transformer" / "serving" / "playground"


def _ask(url: str | httpx.URL, *, method: str = "GET", **options: Any) -> httpx.Response:
    return httpx.request(method, url, timeout=120, **options)


class _Markup(HTMLParser):
    """Tags with attributes, and texts inside scripts and styles."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.inline: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1][0] in ("script", "style") and data.strip():
            self.inline.append(data)


@pytest.mark.parametrize("path", FILES)
def test_every_file_is_sent_without_a_key(keyed_service: KeyedService, path: str) -> None:
    answer = _ask(keyed_service.url + path)
    assert answer.status_code == 200
    assert answer.content == FILES[path].body
    assert answer.headers["content-encoding"] == "gzip"
    assert answer.headers["content-type"] == FILES[path].media_type
    assert answer.headers["x-content-type-options"] == "nosniff"
    plain = _ask(keyed_service.url + path, headers={"accept-encoding": "identity"})
    assert plain.content == FILES[path].body
    assert "content-encoding" not in plain.headers


def test_the_policy_allows_nothing_from_elsewhere_and_nothing_inside(
    keyed_service: KeyedService,
) -> None:
    answer = _ask(keyed_service.url)
    [policy] = answer.headers.get_list("content-security-policy")
    assert policy.split("; ") == [
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' data:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    ]


def test_a_file_that_the_browser_has_is_not_sent_again(keyed_service: KeyedService) -> None:
    first = _ask(f"{keyed_service.url}/playground/main.js")
    assert first.headers.get_list("cache-control") == ["no-cache"]
    same = _ask(
        f"{keyed_service.url}/playground/main.js", headers={"if-none-match": first.headers["etag"]}
    )
    assert (same.status_code, same.content) == (304, b"")
    other = _ask(
        f"{keyed_service.url}/playground/main.js", headers={"if-none-match": 'W/"another"'}
    )
    assert other.content == first.content


@pytest.mark.parametrize(
    "path",
    [
        "/playground/../playground_routes.py",
        "/playground/..%2fplayground_routes.py",
        "/playground/%2e%2e/guard.py",
        "/playground//main.js",
        "/playground/",
        "/playground/main.js/",
        "/playground/__init__.py",
        "/playground/index.html",
    ],
)
def test_no_other_path_is_open(keyed_service: KeyedService, http: httpx.Client, path: str) -> None:
    url = httpx.URL(keyed_service.url).copy_with(raw_path=path.encode())
    assert _ask(url).status_code == 401
    assert http.get(url).status_code == 404


def test_the_page_takes_nothing_but_questions_for_files(keyed_service: KeyedService) -> None:
    assert _ask(keyed_service.url, method="HEAD").status_code == 200
    assert _ask(keyed_service.url, method="POST").status_code == 401


def test_the_page_is_small() -> None:
    assert sum(len(file.zipped) for file in FILES.values()) < 70_000


def test_all_markup_can_live_under_the_policy() -> None:
    markup = _Markup()
    markup.feed(FILES["/"].body.decode())
    assert markup.inline == []
    for tag, attributes in markup.tags:
        assert not [name for name in attributes if name == "style" or name.startswith("on")], tag
        for name in ("src", "href"):
            link = attributes.get(name)
            assert link is None or link.startswith(("/", "#"))
            assert link is None or not link.startswith("/playground/") or link in FILES


def test_the_page_asks_for_every_file() -> None:
    texts = {path: file.body.decode() for path, file in FILES.items()}
    wanted = set(re.findall(r'(?:src|href)="(/playground/.*?)"', texts["/"]))
    for text in texts.values():
        wanted |= {f"/playground/{name}" for name in re.findall(r'from "./(.*?)"', text)}
    assert wanted | {"/"} == set(FILES)


def test_scripts_write_texts_only_as_text() -> None:
    # Entities are read in a document that nobody shows, of which only the text is taken.
    allowed = r"new DOMParser\(\)\.parseFromString\(.*\)\.body\.textContent"
    forbidden = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function|DOMParser|srcdoc"
    for path, file in FILES.items():
        if path.endswith(".js"):
            script = re.sub(allowed, "", file.body.decode())
            assert not re.findall(forbidden, script), path
            for module in re.findall(r'from "(.*?)"', file.body.decode()):
                assert (DIRECTORY / module).is_file()
        assert not re.findall(rb"https?://(?!www\.w3\.org/2000/svg)", file.body), path
