"""The chat of the page in a real browser, against the real service."""

import json
import re
import shlex
import subprocess
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import httpx
import pytest
from markdown_it import MarkdownIt
from playwright.sync_api import expect

from tests.logged_process import running_service
from tests.serving.browser import Visit, give_chat_template, running_browser, visit
from tests.serving.tiny_model import make_tiny_model

CONTEXT_TOKENS = 4096
HOSTILE = "<img src=x onerror=alert(1)><script>alert(2)</script>&lt;b&gt;"
# What stands in an answer is compared with another parser: tags, texts, languages.
MARKDOWN = f"""# A title

Some **bold**, *thin*, ~~gone~~ and `code *as it is* &lt;` &amp; &quot;quoted&quot; text.
A second line.

1. one
2. two
   - inner
   - more

3. three

> A quotation
> of two lines

| a | b |
|---|--:|
| 1 | `x` |

```python
def one():

    return "<b>"
```

{HOSTILE}

[a link](https://example.org/?a=1&b=2 "title") and <https://example.org>

---

The end\\*"""


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    root = tmp_path_factory.mktemp("playground")
    chatty = make_tiny_model(root / "chatty", name="chatty", max_length=CONTEXT_TOKENS)
    give_chat_template(chatty)
    plain = make_tiny_model(root / "plain", name="plain", max_length=CONTEXT_TOKENS, seed=1)
    with running_service(chatty, "--more_models", f"plain={plain}") as (url, process):
        yield url
        assert process.stop() == 0
        assert "Traceback" not in process.log


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with running_browser() as browser:
        yield browser


@pytest.fixture
def tab(browser: Any, url: str) -> Iterator[Visit]:
    with visit(browser, url) as tab:
        tab.open()
        yield tab


def _wait(tab: Visit) -> None:
    tab.page.locator("body:not(.running)[data-saved=yes]").wait_for()


def _send(tab: Visit, text: str) -> str:
    """Type a message, and what the model has answered in the end."""
    number = tab.page.locator(".message").count()
    composer = tab.page.get_by_label("Your message")
    composer.fill(text)
    composer.press("Enter")
    tab.page.locator(".message").nth(number + 1).wait_for()
    _wait(tab)
    return _texts(tab)[-1]


def _texts(tab: Visit) -> list[str]:
    """The messages as they were written."""
    script = "all => all.map(one => one.value)"
    found: list[str] = tab.page.locator("#messages .area").evaluate_all(script)
    return found


def _parameters(tab: Visit, **values: object) -> None:
    tab.page.get_by_role("button", name="Settings").click()
    tab.set_parameters(**{"max_tokens": 12, "min_tokens": 6, "seed": 5, **values})
    tab.page.get_by_role("button", name="Settings").click()


def _ask(url: str, *contents: str, system: str = "", **more: object) -> str:
    """What the service itself answers to messages of which the first is a user's."""
    messages = [{"role": "system", "content": system}] if system else []
    for index, content in enumerate(contents):
        messages.append({"role": "assistant" if index % 2 else "user", "content": content})
    body = {"model": "chatty", "max_tokens": 12, "min_tokens": 6, "seed": 5, **more}
    said = httpx.post(
        f"{url}/v1/chat/completions", json={**body, "messages": messages}, timeout=120
    )
    text: str = said.raise_for_status().json()["choices"][0]["message"]["content"]
    return text


def _answer_with(tab: Visit, text: str) -> None:
    """Let the service answer this, in pieces."""
    events = []
    for start in range(0, len(text), 3):
        delta = {"content": text[start : start + 3]}
        usage = {"prompt_tokens": 9, "completion_tokens": start, "total_tokens": 1000 + start}
        choice = {"index": 0, "delta": delta, "finish_reason": None}
        events.append({"choices": [choice], "usage": usage})
    events[-1]["choices"][0]["finish_reason"] = "stop"  # type: ignore[index]
    body = "".join(f"data: {json.dumps(one)}\n\n" for one in events) + "data: [DONE]\n\n"
    tab.page.route(
        "**/v1/chat/completions",
        lambda route: route.fulfill(body=body, content_type="text/event-stream"),
    )


def test_a_model_that_chats_is_met_in_a_chat(tab: Visit, url: str) -> None:
    assert tab.page.get_by_text("Talk to chatty").is_visible()
    assert tab.page.get_by_label("Text to continue").is_hidden()
    assert tab.page.locator("body").get_attribute("data-colour") == "nothing"
    assert tab.page.locator("#parameter-max_tokens").input_value() == "2048"
    _parameters(tab)
    composer = tab.page.get_by_label("Your message")
    composer.type("Who")
    composer.press("Shift+Enter")
    composer.type("reads?")
    composer.press("Enter")
    tab.page.locator(".message").nth(1).wait_for()
    _wait(tab)
    first = _ask(url, "Who\nreads?")
    assert _texts(tab) == ["Who\nreads?", first]
    assert composer.input_value() == ""
    # The next one, and the context that both take.
    second = _send(tab, "And then?")
    assert second == _ask(url, "Who\nreads?", first, "And then?")
    used = tab.page.locator("#context").inner_text()
    assert used.endswith(" of 4,096 tokens")
    messages = [
        {"role": role, "content": text}
        for role, text in zip(["user", "assistant"] * 2, _texts(tab), strict=True)
    ]
    body = {"model": "chatty", "messages": messages[:3], "max_tokens": 12, "min_tokens": 6}
    said = httpx.post(f"{url}/v1/chat/completions", json={**body, "seed": 5}, timeout=120).json()
    assert used.startswith(f"{said['usage']['total_tokens']:,} ")


def test_the_code_asks_the_same(tab: Visit, url: str) -> None:
    _parameters(tab, min_tokens=0)
    tab.page.get_by_text("System prompt").click()
    tab.page.get_by_label("System prompt").fill("Be brief.")
    _send(tab, "It's who?")
    tab.page.get_by_role("button", name="Code").click()
    recipe = tab.page.locator("#recipe")
    done = subprocess.run(
        [*shlex.split(recipe.inner_text()), "--silent"], capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout)["choices"][0]["message"]["content"] == _texts(tab)[1]
    tab.page.get_by_role("tab", name="fst generate").click()
    words = shlex.split(recipe.inner_text())
    assert words[:2] == ["fst", "generate"]
    assert words[3:7] == ["--system", "Be brief.", "--prompt", "It's who?"]
    assert "--raw" not in words
    tab.page.locator("#recipes").get_by_role("button", name="Close").click()
    tab.page.get_by_role("tab", name="Notebook").click()
    tab.page.get_by_role("button", name="Code").click()
    tab.page.get_by_role("tab", name="fst generate").click()
    assert "--raw" in shlex.split(recipe.inner_text())


def test_a_model_that_does_not_is_met_in_a_notebook(tab: Visit) -> None:
    tab.page.locator("#model").select_option("plain")
    assert tab.page.get_by_role("tab", name="Chat").is_disabled()
    assert tab.page.get_by_label("Text to continue").is_visible()
    assert tab.page.locator("body").get_attribute("data-colour") == "probability"
    assert tab.page.locator("#parameter-max_tokens").input_value() == "128"
    tab.page.locator("#model").select_option("chatty")
    assert tab.page.get_by_label("Your message").is_visible()


class _Reading(HTMLParser):
    """Tags and text of some HTML."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


def test_an_answer_is_markdown_as_another_parser_reads_it(tab: Visit) -> None:
    _answer_with(tab, MARKDOWN)
    _send(tab, MARKDOWN)
    script = "one => [[...one.querySelectorAll('*')].map(e => e.localName), one.innerText]"
    parser = MarkdownIt("commonmark", {"html": False, "breaks": True}).enable(
        ["table", "strikethrough"]
    )
    reading = _Reading(parser.render(MARKDOWN))
    # Headings of an answer stand below those of the page; code has a head with a button.
    ours_only = {"figure", "figcaption", "button", "span", "div"}
    for answer in tab.page.locator(".prose").all():
        tags, text = answer.evaluate(script)
        expected = [{"h1": "h2", "s": "del"}.get(one, one) for one in reading.tags]
        assert sorted(one for one in tags if one not in ours_only) == sorted(expected)
        words = [word for word in text.split() if word not in ("Copy", "python")]
        assert words == reading.text.split()
    assert tab.page.locator("#messages img, #messages script").count() == 0
    link = tab.page.locator(".prose a").first
    assert link.get_attribute("href") == "https://example.org/?a=1&b=2"
    assert "noopener" in (link.get_attribute("rel") or "")


# Markdown texts, each followed by a line of %%%%.
SOURCES = Path(__file__).with_name("markdown_sources.txt").read_text("utf-8").split("\n%%%%\n")[:-1]
READ = """async (texts) => {
  const { Prose } = await import("/playground/markdown.js");
  return texts.map((text) => {
    const prose = new Prose();
    prose.set(text);
    const all = [...prose.element.querySelectorAll("*")];
    for (const one of prose.element.querySelectorAll("figcaption")) one.remove();
    return [all.map((one) => one.localName), prose.element.textContent];
  });
}"""


def test_many_texts_are_read_as_by_another_parser(tab: Visit) -> None:
    """Which elements there are, in order, and the text of them all."""
    parser = MarkdownIt("commonmark", {"html": False, "breaks": True}).enable(
        ["table", "strikethrough"]
    )
    ours_only = {"figure", "figcaption", "button", "span", "div"}
    names = {**{f"h{depth}": f"h{depth + 1}" for depth in range(1, 6)}, "s": "del", "img": "a"}
    for source, (tags, text) in zip(SOURCES, tab.page.evaluate(READ, SOURCES), strict=True):
        reading = _Reading(parser.render(source))
        found = [one for one in tags if one not in ours_only]
        assert found == [names.get(one, one) for one in reading.tags], source
        if "![" not in source:
            assert "".join(text.split()) == "".join(reading.text.split()), source


def test_addresses_and_tasks_are_as_at_github(tab: Visit) -> None:
    sources = [
        "see http://a.b/c. And (www.a.org/x),",
        "- [ ] todo\n- [x] done",
        "a<br>b",
        "~a~ ~~~c~~~",
    ]
    (links, _), (tasks, text), (lines, _), (gone, _) = tab.page.evaluate(READ, sources)
    assert links == ["p", "a", "a"]
    assert (tasks, text) == (["ul", "li", "span", "li", "span"], "☐ todo☑ done")
    assert lines == ["p", "br"]
    assert gone == ["p", "del"]


def test_a_text_that_grows_keeps_what_stays(tab: Visit) -> None:
    """Its first blocks are the same elements, and its end equals that of the whole text read at once."""
    script = """async (text) => {
      const { Prose } = await import("/playground/markdown.js");
      const growing = new Prose(), whole = new Prose();
      let first = null, numKept = 0;
      for (let end = 1; end <= text.length; end += 1) {
        growing.set(text.slice(0, end));
        numKept += first !== null && growing.element.firstChild === first;
        first = growing.element.firstChild;
      }
      whole.set(text);
      return [growing.element.isEqualNode(whole.element), numKept];
    }"""
    is_equal, num_kept = tab.page.evaluate(script, MARKDOWN)
    assert is_equal
    assert num_kept > len(MARKDOWN) / 2


def test_hostile_texts_take_as_long_as_they_are(tab: Visit) -> None:
    """100 KB each; by an expression that backtracks they would take minutes."""
    script = """async ([parts, size]) => {
      const { lexer } = await import("/playground/markdown_blocks.js");
      const texts = parts.map((part) => part.repeat(size / part.length));
      const nested = (left, right, count) => left.repeat(size / count) + "a" + right.repeat(size / count);
      texts.push(nested("![", "](u)", 6), nested("*a ", " a*", 6), nested("*", "*", 2), nested("[", "](", 4));
      texts.push("|a".repeat(size / 5) + "\\n" + "|-".repeat(size / 5) + "\\n" + "x\\n".repeat(size / 10));
      return texts.map((text) => {
        const began = performance.now();
        const raws = lexer(text).map((token) => token.raw).join("\\n");
        return [performance.now() - began, raws === text];
      });
    }"""
    parts = [
        *"[]*_`>~(!<&#|\\\n\t",
        "![",
        "- ",
        "* - ",
        "*a ",
        "_a_ ",
        "[a](",
        '[]( "',
        "[a]: b\n",
        "[a][a]",
        "` `` ",
    ]
    parts += [
        "> - ",
        ">\n",
        "- a\n",
        "http://",
        "<a:",
        "**a*b_",
        "a|b\n-|-\n",
        "```\n",
        "\\\n",
        "# #",
        "<a@b.",
    ]
    for seconds, is_whole in tab.page.evaluate(script, [parts, 100_000]):
        assert is_whole
        assert seconds / 1000 < 5


def test_links_to_programs_are_no_links(tab: Visit) -> None:
    wrong = "[a](javascript:alert(1)) [b](data:text/html,x) ![c](https://example.org/x.png) [d](/x)"
    _answer_with(tab, wrong + "\n\n[e]: javascript:alert(1)\n[e] <javascript:alert(1)>")
    _send(tab, "x")
    links = tab.page.locator(".prose a")
    assert links.evaluate_all("all => all.map(one => one.href)") == ["https://example.org/x.png"]
    assert tab.page.locator("#messages img").count() == 0


def test_code_has_a_button_that_copies_it(browser: Any, url: str) -> None:
    permissions = ["clipboard-read", "clipboard-write"]
    with visit(browser, url, permissions=permissions) as tab:
        tab.open()
        _answer_with(tab, "Here:\n\n```python\nprint('<b>')\n```\n")
        _send(tab, "x")
        tab.page.locator("figcaption button").click()
        tab.page.locator("figcaption button", has_text="Copied").wait_for()
        assert tab.page.evaluate("navigator.clipboard.readText()") == "print('<b>')"


def test_an_edit_and_another_answer_are_branches(tab: Visit, url: str) -> None:
    _parameters(tab)
    first = _send(tab, "Who reads?")
    tab.page.get_by_role("button", name="Answer anew").click()
    tab.page.get_by_text("2/2").wait_for()
    _wait(tab)
    other = _texts(tab)[1]
    tab.page.get_by_role("button", name="The branch before").click()
    assert _texts(tab) == ["Who reads?", first]
    message = tab.page.locator(".message.user")
    message.hover()
    message.get_by_role("button", name="Edit").click()
    box = tab.page.get_by_label("Edit: You")
    assert box.input_value() == "Who reads?"
    box.fill("Who writes?")
    box.press("Enter")
    tab.page.locator(".message.user .branches", has_text="2/2").wait_for()
    _wait(tab)
    assert _texts(tab) == ["Who writes?", _ask(url, "Who writes?")]
    # All of them are there after a reload, and in an export.
    tab.page.reload()
    tab.wait_until_ready()
    assert _texts(tab)[0] == "Who writes?"
    tab.page.locator(".message.user").get_by_role("button", name="The branch before").click()
    assert _texts(tab) == ["Who reads?", other]
    tab.page.locator(".message.assistant").get_by_role("button", name="The branch before").click()
    assert _texts(tab) == ["Who reads?", first]
    tab.page.locator(".message.assistant").get_by_role("button", name="Delete").click()
    assert _texts(tab) == ["Who reads?", other]
    tab.page.get_by_role("button", name="Undo").click()
    assert _texts(tab) == ["Who reads?", first]


def test_an_answer_goes_on_and_its_tokens_branch(tab: Visit, url: str) -> None:
    _parameters(tab)
    first = _send(tab, "Who reads?")
    tab.page.get_by_role("button", name="Continue", exact=True).click()
    expect(tab.page.locator("#messages .area").nth(1)).not_to_have_value(first)
    _wait(tab)
    body = {"system": "", "continue_final_message": True}
    assert _texts(tab)[1] == first + _ask(url, "Who reads?", first, **body)  # type: ignore[arg-type]
    # Colours show the tokens, of the next answers.
    tab.page.get_by_role("button", name="Settings").click()
    tab.page.locator("#colour").select_option("probability")
    tab.page.get_by_role("button", name="Settings").click()
    tab.page.get_by_role("button", name="Answer anew").click()
    tab.page.get_by_text("2/2").wait_for()
    _wait(tab)
    tokens = tab.tokens("#messages")
    assert "".join(one["token"] for one in tokens) == _texts(tab)[1]
    assert all(one["top"] for one in tokens)


def test_a_system_prompt_is_part_of_the_conversation(tab: Visit, url: str) -> None:
    _parameters(tab)
    tab.page.get_by_text("System prompt").click()
    tab.page.get_by_label("System prompt").fill("Be brief.")
    assert _send(tab, "Who?") == _ask(url, "Who?", system="Be brief.")
    tab.page.get_by_role("button", name="New", exact=True).click()
    tab.page.get_by_text("Talk to chatty").wait_for()
    assert tab.page.get_by_label("System prompt").input_value() == ""
    tab.page.get_by_label("Search").fill("brief")
    tab.page.locator(".session", has_text="Who?").click()
    assert tab.page.get_by_label("System prompt").input_value() == "Be brief."


def test_a_text_file_becomes_a_part_of_the_message(tab: Visit, tmp_path: Path) -> None:
    file = tmp_path / "my notes.md"
    file.write_text("A ```fence``` in it\r\nand a line\n", encoding="utf-8")
    composer = tab.page.get_by_label("Your message")
    composer.fill("About this: ")
    tab.page.locator("#text-file").set_input_files(file)
    expected = "About this: ````my_notes.md\nA ```fence``` in it\nand a line\n````\n"
    expect(composer).to_have_value(expected)
    # Dropped anywhere on the page.
    drop = """text => {
      const files = new DataTransfer();
      files.items.add(new File([text], 'dropped.txt'));
      for (const name of ['dragover', 'drop']) {
        const options = { dataTransfer: files, bubbles: true, cancelable: true };
        document.body.dispatchEvent(new DragEvent(name, options));
      }
    }"""
    tab.page.evaluate(drop, "one more")
    expect(composer).to_have_value(re.compile("```dropped.txt\none more\n```"))
    (tmp_path / "x.bin").write_bytes(b"\xff\x00\x01")
    tab.page.locator("#text-file").set_input_files(tmp_path / "x.bin")
    tab.page.get_by_text("x.bin is not a text in UTF-8.").wait_for()


def test_conversations_of_earlier_versions_are_read(tab: Visit, tmp_path: Path) -> None:
    messages = [
        {"role": "system", "text": "Be brief.", "marks": []},
        {"role": "user", "text": "Who?", "marks": []},
        {"role": "assistant", "text": "Me.", "marks": [{"start": 0, "end": 3, "made": True}]},
    ]
    session = {"id": "1", "mode": "chat", "title": "Who?", "chat": {"messages": messages}}
    file = tmp_path / "history.json"
    file.write_text(json.dumps({"format": "fst.playground/1", "sessions": [session]}))
    tab.page.locator("#import-file").set_input_files(file)
    tab.page.locator(".session", has_text="Who?").click()
    assert _texts(tab) == ["Who?", "Me."]
    assert tab.page.get_by_label("System prompt").input_value() == "Be brief."
    nodes = [{"id": 1, "parent": 2, "role": "user", "text": "a"}]
    session = {"id": "2", "mode": "chat", "title": "x", "chat": {"nodes": nodes, "leaf": 1}}
    file.write_text(json.dumps({"format": "fst.playground/1", "sessions": [session]}))
    tab.page.locator("#import-file").set_input_files(file)
    tab.page.get_by_text("a branch begins nowhere").wait_for()


CONTRASTS = Path(__file__).with_name("contrasts.js").read_text(encoding="utf-8")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_a_chat_can_be_read(browser: Any, url: str, scheme: str, width: int) -> None:
    with visit(browser, url, color_scheme=scheme, viewport={"width": width, "height": 800}) as tab:
        tab.open()
        _answer_with(tab, MARKDOWN)
        _send(tab, "Who?")
        contrasts = tab.page.evaluate(CONTRASTS)
        assert len(contrasts) > 20
        assert [one for one in contrasts if one[0] < 4.5] == []
        assert tab.page.evaluate("document.documentElement.scrollWidth") <= width
