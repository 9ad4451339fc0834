"""The page in a real browser, against the real service."""

import json
import re
import shlex
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from playwright.sync_api import expect

from full_stack_transformer.command_line import _make_app, _normalize
from tests.logged_process import running_service
from tests.serving.browser import Visit, give_chat_template, running_browser, visit
from tests.serving.conftest import KeyedService
from tests.serving.task_models import make_task_models
from tests.serving.tiny_model import make_tiny_model

# So many tokens that none of the tests sees the end of them.
CONTEXT_TOKENS = 65_536
NUM_SLOTS = 4
ENDLESS = {"max_tokens": CONTEXT_TOKENS - 1000, "min_tokens": CONTEXT_TOKENS - 1000}
CONTRASTS = Path(__file__).with_name("contrasts.js").read_text(encoding="utf-8")
HOSTILE = "<img src=x onerror=alert(1)><script>alert(2)</script>&lt;b&gt;"


@dataclass(frozen=True)
class Service:
    """A running service of two models; the second one chats."""

    url: str

    def complete(self, **body: Any) -> dict[str, Any]:
        """What the service itself answers."""
        answer = httpx.post(f"{self.url}/v1/completions", json=body, timeout=120)
        choice: dict[str, Any] = answer.raise_for_status().json()["choices"][0]
        return choice

    def gauge(self, name: str) -> int:
        """A figure of its metrics, over all models."""
        text = httpx.get(f"{self.url}/metrics", timeout=120).text
        values = re.findall(rf"^{name}(?:{{.*}})? (.*)$", text, re.MULTILINE)
        assert values
        return int(sum(map(float, values)))

    def wait_for(self, name: str, value: int) -> None:
        """Ask until a figure has the value."""
        deadline = time.monotonic() + 120
        while self.gauge(name) != value:
            assert time.monotonic() < deadline, f"{name} never became {value}"
            threading.Event().wait(0.02)

    @contextmanager
    def occupied(self) -> Iterator[None]:
        """All slots of the first model are taken by somebody who waits for whole texts."""
        body = json.dumps({"prompt": "x", "n": NUM_SLOTS, **ENDLESS})
        host, port = urlsplit(self.url).netloc.split(":")
        with socket.create_connection((host, int(port)), timeout=120) as connection:
            head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(body)}\r\n\r\n"
            connection.sendall((head + body).encode())
            self.wait_for("vllm:num_requests_running", NUM_SLOTS)
            yield
        self.wait_for("vllm:num_requests_running", 0)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    root = tmp_path_factory.mktemp("playground")
    plain = make_tiny_model(root / "plain", name="plain", max_length=CONTEXT_TOKENS)
    chatty = make_tiny_model(root / "chatty", name="chatty", max_length=CONTEXT_TOKENS, seed=1)
    give_chat_template(chatty)
    options = ("--more_models", f"chatty={chatty}", "--max_batch_size", str(NUM_SLOTS))
    with running_service(plain, *options) as (url, process):
        yield Service(url)
        assert process.stop() == 0
        assert "Traceback" not in process.log


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with running_browser() as browser:
        yield browser


@pytest.fixture
def tab(browser: Any, service: Service) -> Iterator[Visit]:
    with visit(browser, service.url) as tab:
        yield tab


def _write(tab: Visit, text: str) -> Any:
    area = tab.page.get_by_label("Text to continue")
    area.fill(text)
    return area


def _continue(tab: Visit, text: str, **parameters: object) -> str:
    """The text after the model has gone on with it."""
    area = _write(tab, text)
    tab.set_parameters(**{"max_tokens": 24, "seed": 3, **parameters})
    area.press("Control+Enter")
    tab.wait_until_idle()
    after: str = area.input_value()
    assert after.startswith(text)
    return after


def _first_with_choices(tab: Visit) -> tuple[int, dict[str, Any]]:
    """A token with two alternatives at least that are whole characters, and its number."""
    for number, mark in enumerate(tab.tokens()):
        texts = [token for token, _ in mark["top"] if not token.startswith(("bytes:", "["))]
        if number > 1 and len(texts) > 2:
            return number, mark
    raise AssertionError("no token has alternatives to choose from")


def test_a_text_goes_on_in_place_as_the_service_says(tab: Visit, service: Service) -> None:
    tab.open()
    after = _continue(tab, "The reader 🙂", min_tokens=24)
    body: dict[str, Any] = {"model": "plain", "prompt": "The reader 🙂", "max_tokens": 24}
    body |= {"min_tokens": 24, "seed": 3, "logprobs": 5}
    body |= {"temperature": 0.7, "top_p": 0.95, "repetition_penalty": 1.1}
    expected = service.complete(**body)
    assert after == "The reader 🙂" + expected["text"]
    # JavaScript counts UTF-16 units: the tints must cover what the tokens wrote, and nothing else.
    tokens = tab.tokens()
    covered = after.encode("utf-16-le")[2 * tokens[0]["start"] :].decode("utf-16-le")
    assert "".join(token["token"] for token in tokens) == covered == expected["text"]
    assert all(token["top"] and token["made"] for token in tokens)
    assert "24 tokens" in tab.page.locator("#state").inner_text()
    assert "seed 3" in tab.page.locator("#state").inner_text()


def test_the_layers_of_a_text_break_their_lines_alike(tab: Visit) -> None:
    tab.open()
    for width in (1280, 700, 360):
        tab.page.set_viewport_size({"width": width, "height": 800})
        _write(
            tab, "A long-winded sentence\twith tabs,   spaces and  Unbrechbarkeiten " * 20 + "\n\n"
        )
        heights = "['.area', '.layer'].map(one => document.querySelector(one).scrollHeight)"
        area, layer = tab.page.evaluate(heights)
        assert area == layer


def test_stop_frees_the_slot_at_once(tab: Visit, service: Service) -> None:
    tab.open()
    area = _write(tab, "The")
    tab.set_parameters(**ENDLESS)
    area.press("Control+Enter")
    tab.page.locator("#sheet .token").nth(3).wait_for()
    assert service.gauge("vllm:num_requests_running") == 1
    tab.page.keyboard.press("Escape")
    tab.wait_until_idle()
    service.wait_for("vllm:num_requests_running", 0)
    assert "stopped by you" in tab.page.locator("#state").inner_text()
    assert len(tab.tokens()) < ENDLESS["max_tokens"]
    assert area.is_editable()


def test_stop_works_before_the_first_token(tab: Visit, service: Service) -> None:
    tab.open()
    with service.occupied():
        area = _write(tab, "The")
        area.press("Control+Enter")
        service.wait_for("vllm:num_requests_waiting", 1)
        tab.page.get_by_role("button", name="Stop").click()
        service.wait_for("vllm:num_requests_waiting", 0)
        tab.wait_until_idle()
        assert area.input_value() == "The"
        assert service.gauge("vllm:num_requests_running") == NUM_SLOTS


def test_a_clicked_alternative_branches(tab: Visit, service: Service) -> None:
    tab.open()
    before = _continue(tab, "The reader")
    number, mark = _first_with_choices(tab)
    tab.page.locator("#sheet .token").nth(number).hover(force=True)
    choices = tab.page.locator("#alternatives button:not(:disabled):not(.control)")
    choices.first.wait_for()
    other = next(one for one in choices.all() if one.get_attribute("aria-pressed") == "false")
    token = other.get_attribute("data-token")
    other.click()
    tab.wait_until_idle()
    after = tab.page.get_by_label("Text to continue").input_value()
    prefix = before[: mark["start"]] + token
    body: dict[str, Any] = {"model": "plain", "prompt": prefix, "max_tokens": 24, "seed": 3}
    body |= {"temperature": 0.7, "top_p": 0.95, "repetition_penalty": 1.1}
    assert after == prefix + service.complete(**body)["text"]
    tab.page.get_by_role("button", name="Undo").click()
    assert tab.page.get_by_label("Text to continue").input_value() == before


def test_the_keyboard_reaches_everything(tab: Visit) -> None:
    tab.open()
    before = _continue(tab, "The reader")
    area = tab.page.get_by_label("Text to continue")
    area.focus()
    _, mark = _first_with_choices(tab)
    area.evaluate("(one, place) => one.setSelectionRange(place, place)", mark["start"])
    area.press("Alt+ArrowDown")
    tab.page.locator("#alternatives button:focus").wait_for()
    tab.page.keyboard.press("Escape")
    assert tab.page.locator("#alternatives").is_hidden()
    assert area.evaluate("one => one === document.activeElement")
    area.press("Alt+ArrowDown")
    tab.page.keyboard.press("ArrowDown")
    tab.page.keyboard.press("Enter")
    tab.wait_until_idle()
    area.press("Control+z")
    assert area.input_value() == before
    area.press("Control+Shift+Z")
    area.press("Control+z")
    area.press("End")
    area.press("x")
    assert area.input_value() != before
    area.press("Control+z")
    assert area.input_value() == before


def test_an_edit_keeps_what_is_known_of_the_text_before_it(tab: Visit) -> None:
    tab.open()
    after = _continue(tab, "The reader")
    tokens = tab.tokens()
    place = tokens[4]["start"]
    area = tab.page.get_by_label("Text to continue")
    area.evaluate(f"one => one.setSelectionRange({place}, {place})")
    area.press("#")
    edited = after[:place] + "#" + after[place:]
    assert area.input_value() == edited
    assert tab.tokens()[:4] == tokens[:4]
    behind = tab.tokens()[4:]
    assert all(one["made"] and "logprob" not in one for one in behind)
    assert [one["start"] for one in behind] == [one["start"] + 1 for one in tokens[4:]]


def test_regenerate_takes_the_last_answer_back(tab: Visit) -> None:
    tab.open()
    before = _continue(tab, "The reader", temperature=4, min_tokens=24)
    tab.page.get_by_role("button", name="Regenerate").click()
    expect(tab.page.locator(".area").first).not_to_have_value(before)
    tab.page.locator("body:not(.running)").wait_for()
    seed = tab.page.locator("#state").inner_text()
    assert "seed 3 " not in seed
    tab.page.get_by_role("button", name="Use this seed").click()
    assert f"seed {tab.page.locator('#parameter-seed').input_value()} " in seed


def test_a_reload_keeps_the_history(tab: Visit, browser: Any, tmp_path: Path) -> None:
    tab.open()
    first = _continue(tab, "The first one", top_k=7)
    tokens = tab.tokens()
    tab.wait_until_saved()
    tab.page.reload()
    tab.wait_until_ready()
    area = tab.page.get_by_label("Text to continue")
    assert area.input_value() == first
    assert tab.tokens() == tokens
    assert tab.page.locator("#parameter-top_k").input_value() == "7"

    tab.page.get_by_role("button", name="New").click()
    expect(area).to_have_value("")
    _write(tab, "A second one " + HOSTILE)
    tab.wait_until_saved()
    tab.page.get_by_role("button", name="History").click()
    tab.page.locator(".session", has_text="A second one <img").wait_for()
    tab.page.get_by_label("Search").fill("FIRST reader")
    tab.page.get_by_text("Nothing is like this.").wait_for()
    tab.page.get_by_label("Search").fill("one FIRST")
    assert tab.page.locator(".session").count() == 1
    tab.page.get_by_label("Search").fill("")
    with tab.page.expect_download() as download:
        tab.page.get_by_role("button", name="Export").click()
    exported = tmp_path / "history.json"
    download.value.save_as(exported)
    tab.page.locator(".session", has_text="The first one").click()
    assert area.input_value() == first

    with visit(browser, tab.url) as other:
        other.open()
        other.page.get_by_role("button", name="History").click()
        other.page.locator("#import-file").set_input_files(exported)
        other.page.locator(".session", has_text="The first one").click()
        assert other.page.get_by_label("Text to continue").input_value() == first
        assert other.tokens() == tokens
        (tmp_path / "wrong.json").write_text('{"format": "fst.playground/1", "sessions": [{}]}')
        other.page.locator("#import-file").set_input_files(tmp_path / "wrong.json")
        other.page.get_by_text("wrong.json is not an export of this page").wait_for()


def test_the_models_html_stays_text(tab: Visit) -> None:
    tab.open()
    wanted = json.dumps({"type": "regex", "regex": re.escape(HOSTILE).replace("\\-", "-")})
    after = _continue(tab, "The", response_format=wanted, max_tokens=200)
    assert after == "The" + HOSTILE
    tab.page.locator("#sheet .token").nth(2).hover(force=True)
    tab.page.locator("#alternatives button").first.wait_for()
    assert tab.page.locator("main img, main script, #alternatives img").count() == 0


def test_whatever_the_service_says_stays_text(tab: Visit) -> None:
    """Names of models, data sets and tokens, and errors, come from files that others wrote."""
    facts = {
        "model": HOSTILE, "task": "causal_lm", "checkpoint": HOSTILE, "step": 1, "validation_loss": 1.5,
        "context_tokens": 64, "computed_by": HOSTILE, "has_chat_template": True, "control_tokens": [HOSTILE],
        "num_swaps": 0, "loaded_at": 1, "description": {"dataset": {"dataset_name": HOSTILE}},
    }  # fmt: skip
    version = {
        "package_version": HOSTILE,
        "model": HOSTILE,
        "description": {},
        "models": [facts] * 2,
    }
    tab.page.route("**/version", lambda route: route.fulfill(json=version))
    logprobs = {
        "tokens": [HOSTILE], "token_logprobs": [-1.0], "top_logprobs": [{HOSTILE: -1.0, "b" + HOSTILE: -2.0}],
        "text_offset": [0],
    }  # fmt: skip
    chunk = {
        "choices": [{"index": 0, "text": HOSTILE, "logprobs": logprobs, "finish_reason": "length"}]
    }
    events = f"data: {json.dumps(chunk)}\n\ndata: {json.dumps({'error': {'message': HOSTILE}})}\n\n"
    tab.page.route(
        "**/v1/completions",
        lambda route: route.fulfill(body=events, content_type="text/event-stream"),
    )
    tab.open()
    assert tab.page.locator("#welcome").inner_text().startswith(f"Talk to {HOSTILE}")
    tab.page.get_by_role("tab", name="Notebook").click()
    area = _write(tab, HOSTILE)
    area.press("Control+Enter")
    tab.wait_until_idle()
    assert area.input_value() == 2 * HOSTILE
    assert tab.page.locator("#problem").inner_text() == HOSTILE
    assert HOSTILE in tab.page.locator("#card-line").inner_text()
    tab.page.locator("#sheet .token").hover(force=True)
    tab.page.locator("#alternatives button").nth(1).wait_for()
    tab.page.get_by_role("button", name="Code").click()
    assert tab.page.locator("img").count() == 1
    assert tab.page.locator("body script").count() == 0


def test_a_wrong_key_asks_for_the_right_one(browser: Any, keyed_service: KeyedService) -> None:
    with visit(browser, keyed_service.url) as tab:
        tab.page.goto(tab.url)
        dialog = tab.page.get_by_role("dialog", name="This service wants a key")
        dialog.wait_for()
        assert not tab.page.get_by_text("This key is not the right one").is_visible()
        dialog.get_by_label("Key", exact=True).fill("a-wrong-key")
        dialog.get_by_role("button").click()
        tab.page.get_by_text("This key is not the right one").wait_for()
        dialog.get_by_label("Key", exact=True).fill(keyed_service.key)
        dialog.get_by_role("button").click()
        tab.wait_until_ready()
        assert len(_continue(tab, "The reader")) > len("The reader")
        tab.page.get_by_role("button", name="Code").click()
        assert "$FST_API_KEY" in tab.page.locator("#recipe").inner_text()
        assert keyed_service.key not in tab.page.content()
        tab.page.reload()
        tab.wait_until_ready()
        assert tab.page.evaluate("Object.values(localStorage).join()").count(keyed_service.key) == 0
        refusals = [one for one in tab.problems if "401" in one]
        assert refusals == tab.problems  # a browser says of itself that it was refused
        tab.problems.clear()


def test_measuring_gives_the_perplexity_of_the_text(tab: Visit, service: Service) -> None:
    tab.open()
    text = "The reader looks for café 🙂"
    _write(tab, text)
    tab.page.get_by_role("button", name="Measure").click()
    tab.page.locator("#state b").wait_for()
    scored = service.complete(prompt=text, max_tokens=0, echo=True, logprobs=1)["logprobs"]
    values = scored["token_logprobs"][1:]
    perplexity = 2.718281828459045 ** (-sum(values) / len(values))
    assert tab.page.locator("#state b").inner_text() == f"Perplexity {perplexity:.2f}"
    assert "".join(one["token"] for one in tab.tokens()) == text


def test_variants_of_two_models_stand_beside_each_other(tab: Visit) -> None:
    tab.open()
    tab.page.locator("#other").select_option("chatty")
    _write(tab, "The reader")
    tab.set_parameters(n=2, max_tokens=12, seed=3, min_tokens=12, temperature=4)
    tab.page.get_by_label("Text to continue").press("Control+Enter")
    tab.wait_until_idle()
    cards = tab.page.locator(".variant")
    assert cards.locator("h3").all_inner_texts() == ["plain", "plain", "chatty", "chatty"]
    texts = [one.input_value() for one in cards.locator(".area").all()]
    assert len(set(texts)) == 4
    assert ["seed 3" in one for one in cards.locator("footer span").all_inner_texts()] == [
        *(True, False, True, False)
    ]
    cards.nth(2).get_by_role("button", name="Keep").click()
    assert tab.page.get_by_label("Text to continue").input_value() == "The reader" + texts[2]
    assert cards.count() == 0


def test_the_code_gives_the_same_text(tab: Visit) -> None:
    tab.open()
    prompt = 'It\'s a "reader"\nand'
    text = _continue(tab, prompt, top_k=20, stop="zzz")[len(prompt) :]
    tab.page.get_by_role("button", name="Code").click()
    recipe = tab.page.locator("#recipe")
    words = shlex.split(recipe.inner_text())
    done = subprocess.run([*words, "--silent"], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["choices"][0]["text"] == text
    tab.page.get_by_role("tab", name="Python").click()
    heard: list[str] = []
    exec(recipe.inner_text(), {"print": heard.append})
    assert heard == [text]
    tab.page.get_by_role("tab", name="fst generate").click()
    words = shlex.split(recipe.inner_text())
    assert words[0] == "fst"
    _, parsed, _ = _make_app().parse_args(
        _normalize(words[1:]), exit_on_error=False, print_error=False
    )
    given = parsed.arguments["given"]
    assert (given.prompt, given.stop, given.seed, given.top_k) == (prompt, ("zzz",), 3, 20)


def test_the_form_is_the_services_schema(tab: Visit, service: Service) -> None:
    tab.open()
    paths = httpx.get(f"{service.url}/openapi.json", timeout=120).json()["paths"]
    schema = paths["/v1/completions"]["post"]["requestBody"]["content"]["application/json"][
        "schema"
    ]
    shown = tab.page.locator("#parameters .field").all_text_contents()
    for name in (
        "max_tokens",
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "stop",
        "seed",
        "logit_bias",
    ):
        meaning = schema["properties"][name]["description"]
        assert any(name in one and meaning in one for one in shown), name
    assert tab.page.locator("#parameter-user").count() == 0
    tab.page.locator("#preset").select_option("precise")
    assert tab.page.locator("#parameter-temperature").input_value() == "0"
    tab.set_parameters(temperature=0.33)
    assert tab.page.locator("#preset").input_value() == "own"


def test_a_replaced_model_is_noticed(tab: Visit) -> None:
    swapped = threading.Event()

    def answer(route: Any) -> None:
        version = route.fetch().json()
        if swapped.is_set():
            version["models"][0] |= {"num_swaps": 1, "step": 900, "validation_loss": 4.25}
        route.fulfill(json=version)

    tab.page.route("**/version", answer)
    tab.open()
    assert "step 0 · validation loss 5.500" in tab.page.locator("#card-line").inner_text()
    swapped.set()
    _continue(tab, "The")
    tab.page.get_by_text("A newer plain is served now: step 900").wait_for()
    assert "validation loss 4.250" in tab.page.locator("#card-line").inner_text()


_LINES_AND_ANSWERS = {
    "sequence_classification": ("the cat", ".result .bar-row", 2),
    "token_labelling": ("the cat sees", ".result .word", 3),
    "span_selection": ("which animal\nthe cat sees the oak", ".result .words", 1),
    "multiple_choice": ("which animal\nthe cat\nthe oak", ".result .bar-row", 2),
    "sentence_embedding": ("the cat\nthe dog", ".matrix td", 5),
    "masked_lm": ("the [MASK] sees [MASK]", ".result .bar-row", 10),
}


def test_models_of_other_tasks_show_what_they_do(
    browser: Any, model_dir: Path, tmp_path: Path
) -> None:
    options = make_task_models(tmp_path)
    with running_service(model_dir, *options) as (url, _), visit(browser, url) as tab:
        tab.open()
        for name, (lines, place, number) in _LINES_AND_ANSWERS.items():
            tab.page.locator("#model").select_option(name)
            tab.page.locator(".task-text").fill(lines)
            tab.page.keyboard.press("Control+Enter")
            found = tab.page.locator(place)
            found.first.wait_for()
            assert found.count() == number, name
            shown = tab.page.locator(".results").inner_text()
            assert lines.split("\n")[0][:8] in shown
        tab.page.locator("#model").select_option("multiple_choice")
        tab.page.locator(".task-text").fill("which animal\nthe cat\nthe oak")
        tab.page.get_by_role("button", name="Choose").click()
        bars = tab.page.locator(".bar-row").first
        bars.wait_for()
        share = float(bars.locator("span").inner_text().removesuffix(" %")) / 100
        width = "all => all[0].offsetWidth / all[0].parentElement.offsetWidth"
        found_share = tab.page.locator(".bar-row .probability").evaluate_all(width)
        assert found_share == pytest.approx(share, abs=0.02)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_everything_can_be_read(browser: Any, service: Service, scheme: str, width: int) -> None:
    viewport = {"width": width, "height": 800}
    with visit(browser, service.url, color_scheme=scheme, viewport=viewport) as tab:
        tab.open()
        _continue(tab, "The reader") if width > 800 else _write(tab, "The reader")
        tab.page.locator("#card summary").click()
        contrasts = tab.page.evaluate(CONTRASTS)
        assert len(contrasts) > 20
        assert [one for one in contrasts if one[0] < 4.5] == []
        assert tab.page.evaluate("document.documentElement.scrollWidth") <= width
        nameless = tab.page.locator("button, input, select, textarea").evaluate_all(
            "all => all.filter(one => !(one.ariaLabel || one.labels?.length || one.textContent.trim()))"
            ".map(one => one.outerHTML)"
        )
        assert nameless == []


def test_the_theme_can_be_chosen(tab: Visit) -> None:
    tab.open()
    colour = "getComputedStyle(document.documentElement).colorScheme"
    for name in ("light", "dark"):
        tab.page.get_by_role("button", name="Theme").click()
        assert tab.page.evaluate(colour) == name
    tab.page.reload()
    tab.wait_until_ready()
    assert tab.page.evaluate(colour) == "dark"
