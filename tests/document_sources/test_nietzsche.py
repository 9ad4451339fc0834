"""Project Gutenberg's books: how they are cut, and what happens when they cannot be had."""

import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from full_stack_transformer.document_sources import nietzsche
from full_stack_transformer.document_sources.nietzsche import nietzsche_documents, split_book
from full_stack_transformer.errors import MachineError

HEADER = """\ufeffThe Project Gutenberg eBook of Of Pots and Rivers

This ebook is for the use of anyone anywhere.

*** START OF THE PROJECT GUTENBERG EBOOK OF POTS
AND RIVERS ***
"""

BODY = """
Produced by a friend of books

OF POTS AND RIVERS

By F. N.

CONTENTS

INTRODUCTION                                1

Of the Potters
Of the Rivers

INTRODUCTION BY THE TRANSLATOR

What the translator has to say of the book is not what the author has said in
the book, and so it has no place among his aphorisms.

FIRST PART.

I. OF THE POTTERS

He who makes a pot makes a hole, and he is paid for the clay; but it is the
hole that the buyer _carries_ home.[1]

And so it is with all who teach.

[1] An allusion to another pot, which nobody has seen for a long time now.

       *       *       *       *       *

1

=Of the Hole.=\u2014It is with the hole as it is with the truth: one must put something
around it, or else no one will believe that it is there.

2.

The river does not ask the way.

3. "What is deep?" asked the one. \u201cThat which has no need to be so,\u201d said the other, who
had been to the well in 1882 and knew of what he spoke.

1882. was a year in which there was no rain and all of the pots were empty, says he.

12. Too far away to be the number that is next, and so it is a part of the third one.

4.

   O you that sing of the river,
   and have not been in it!

SECOND PART.

1. Once more from the start: who counts his pots has too few of them to be at peace.

THE END

APPENDIX

What somebody else has to say on all of this, which is not what one wants to have here.
"""

FOOTER = "*** END OF THE PROJECT GUTENBERG EBOOK OF POTS AND RIVERS ***\n\nThe licence of it.\n"


def test_a_book_becomes_aphorisms() -> None:
    potters, hole, river, deep, song, again = split_book(BODY.replace("\n", "\r\n"))
    assert potters == (
        "OF THE POTTERS\n\n"
        "He who makes a pot makes a hole, and he is paid for the clay; but it is the hole that "
        "the buyer carries home.\n\n"
        "And so it is with all who teach."
    )
    assert hole.startswith(
        "Of the Hole.--It is with the hole as it is with the truth: one must put"
    )
    assert river == "The river does not ask the way."
    assert deep.startswith('"What is deep?" asked the one. "That which')
    assert "1882. was a year" in deep
    assert "12. Too far away" in deep
    assert song == "O you that sing of the river,\nand have not been in it!"
    assert again.startswith("Once more from the start")


def test_header_footer_and_what_others_wrote_are_left_out() -> None:
    body = nietzsche._body(HEADER + BODY + FOOTER, "Of Pots", "http://example")
    text = "\n".join(split_book(body))
    for word in ("Gutenberg", "licence", "translator", "allusion", "Produced", "somebody", "F. N."):
        assert word not in text


class _Library(BaseHTTPRequestHandler):
    """Project Gutenberg with two books; the class attribute is what it answers."""

    answer: tuple[int, str] = (200, "")

    def do_GET(self) -> None:
        has_book = self.path in ("/cache/epub/4363/pg4363.txt", "/cache/epub/1998/pg1998.txt")
        status, text = self.answer if has_book else (404, "no such book")
        content = text.encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Say nothing on standard error."""


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(_Library, "answer", (200, HEADER + BODY + FOOTER))
    with ThreadingHTTPServer(("127.0.0.1", 0), _Library) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def test_books_are_downloaded_and_missing_ones_are_named(
    library: str, caplog: pytest.LogCaptureFixture
) -> None:
    documents = list(nietzsche_documents(library))
    # Both books have the same text here, and no aphorism comes twice.
    assert [document.text for document in documents] == list(split_book(BODY))
    assert {document.source for document in documents} == {"book 1998"}
    assert caplog.text.count("left out") == len(nietzsche.BOOKS) - 2
    assert "no longer has Ecce Homo (52190)" in caplog.text


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ((200, "<html>Are you a robot?</html>"), "sent something else than .*Are you a robot"),
        ((503, "later"), "503 Service Unavailable"),
        ((200, HEADER + "word " * 10_000), "more than 1,000 bytes"),
        ((404, ""), "has none of the 11 books"),
    ],
    ids=["no-book", "unavailable", "too-large", "none"],
)
def test_an_answer_that_is_no_book_ends_in_one_sentence(
    answer: tuple[int, str], reason: str, library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_Library, "answer", answer)
    monkeypatch.setattr(nietzsche, "_MAX_BOOK_BYTES", 1_000)
    with pytest.raises(MachineError, match=reason) as caught:
        list(nietzsche_documents(library))
    assert "\n" not in str(caught.value)
    assert "fst collect_documents python_docs" in str(caught.value)


def test_without_network_the_command_says_what_to_do_instead(tmp_path: Path) -> None:
    # A proxy at which nobody listens cuts the network off on every machine.
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        proxy = f"http://127.0.0.1:{unused.getsockname()[1]}"
        command = [sys.executable, "-m", "full_stack_transformer", "collect_documents", "nietzsche"]
        done = subprocess.run(
            [*command, "--documents_root", str(tmp_path / "documents")],
            env=os.environ | {"HTTPS_PROXY": proxy, "https_proxy": proxy, "NO_PROXY": ""},
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 1
    assert done.stdout == ""
    assert re.fullmatch(
        r"fst: downloading 'Thus Spake Zarathustra' from https://www\.gutenberg\.org failed: .*; "
        r"use `fst collect_documents python_docs`, which needs no network, or put .*\n",
        done.stderr,
    )
    assert not (tmp_path / "documents").exists()
