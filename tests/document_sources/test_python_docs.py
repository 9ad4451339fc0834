"""The interpreter's own documentation, through the real command, and the rules that clean it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from full_stack_transformer.document_sources.documents import (
    Section,
    SeenLines,
    falls_to_validation,
    is_prose,
    is_readable,
    make_pages,
    share_of_function_words,
    tidy,
    without_legal_paragraphs,
)
from full_stack_transformer.document_sources.python_docs import (
    builtin_module_names,
    builtin_sections,
)
from full_stack_transformer.document_sources.python_sources import source_files, source_sections

DELIMITER = "[END_OF_DOCUMENT]"


def _run_command(root: Path, cwd: Path, **environment: str) -> tuple[bytes, bytes, str]:
    """What the command writes into train.txt and valid.txt, and on standard error."""
    command = [sys.executable, "-W", "error", "-m", "full_stack_transformer"]
    command += ["collect_documents", "python_docs", "--documents_root", str(root)]
    done = subprocess.run(
        command,
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)} | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{root / 'python_docs'}\n"
    directory = root / "python_docs"
    return (
        (directory / "train.txt").read_bytes(),
        (directory / "valid.txt").read_bytes(),
        done.stderr,
    )


@pytest.fixture(scope="module")
def collected(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, bytes, str]:
    root = tmp_path_factory.mktemp("first")
    return _run_command(root, root, PYTHONHASHSEED="1")


@pytest.fixture(scope="module")
def documents(collected: tuple[bytes, bytes, str]) -> tuple[list[str], list[str]]:
    """Documents to train and to validate."""
    train, valid, _ = (part if isinstance(part, str) else part.decode() for part in collected)
    return _documents(train), _documents(valid)


def _documents(content: str) -> list[str]:
    *documents, rest = content.split(f"\n{DELIMITER}\n")
    assert not rest
    return documents


def test_the_bytes_depend_on_neither_hash_seed_nor_directory_nor_locale(
    collected: tuple[bytes, bytes, str], tmp_path: Path
) -> None:
    again = _run_command(tmp_path, Path("/"), PYTHONHASHSEED="2", LC_ALL="C", PYTHONUTF8="0")
    assert again[:2] == collected[:2]


def test_the_command_says_in_one_line_what_it_wrote(collected: tuple[bytes, bytes, str]) -> None:
    assert re.fullmatch(
        r"collected [\d,]+ train and [\d,]+ validation documents, \d\.\d MB, in [\d.]+ s: .*\n",
        collected[2],
    )


def test_there_is_enough_to_train_a_small_model(
    documents: tuple[list[str], list[str]],
) -> None:
    train, valid = documents
    sizes = [sum(map(len, part)) for part in documents]
    assert sum(sizes) > 2_500_000
    assert 0.02 < sizes[1] / sum(sizes) < 0.08
    assert sum(sizes) / (len(train) + len(valid)) > 1_500
    assert all(len(document) >= 200 for document in train + valid)


def test_validation_documents_are_not_in_the_training_file(
    documents: tuple[list[str], list[str]],
) -> None:
    train, valid = documents
    assert len({*train, *valid}) == len(train) + len(valid)
    trained_lines = {line for document in train for line in document.splitlines()}
    lines = [line for document in valid for line in document.splitlines() if len(line) > 30]
    assert sum(line in trained_lines for line in lines) < 0.02 * len(lines)


def test_nothing_of_the_machine_is_in_the_documents(
    documents: tuple[list[str], list[str]],
) -> None:
    text = "\n".join(documents[0] + documents[1])
    assert not re.search(r" at 0x[0-9a-fA-F]{4,}", text)
    # The documentation itself speaks of short prefixes such as /usr/local.
    places = (Path(sys.prefix), Path(sys.base_prefix), Path.home(), Path(__file__).parents[2])
    for path in places:
        if len(path.parts) > 3 or path == Path.home():
            assert not re.search(rf"{re.escape(str(path))}(/|\b)", text), path


def test_the_documents_are_clean_english(documents: tuple[list[str], list[str]]) -> None:
    everything = documents[0] + documents[1]
    text = "\n".join(everything)
    assert not re.search(r"[ \t]\n|\n\n\n|[\x00-\x08\x0b-\x1f\x7f]", text)
    assert not re.search(r"^[-=*#~]{4,}$", text, re.MULTILINE)
    assert max(len(word) for word in text.split()) <= 100
    assert share_of_function_words(text) > 0.3
    assert sum(share_of_function_words(each) > 0.2 for each in everything) > 0.97 * len(everything)


@pytest.mark.parametrize(
    "sentence",
    [
        'The "with" statement is used to wrap the execution of a block with',
        "Return the entire formatted message as a string.",
        "Iterators in Python aren't a matter of type but of protocol.  A large",
        "Return the cosine of x (measured in radians).",
    ],
    ids=["topic", "docstring", "comment", "module-in-c"],
)
def test_each_kind_of_text_is_there(sentence: str, documents: tuple[list[str], list[str]]) -> None:
    assert any(sentence in document for document in documents[0] + documents[1])


SOURCE = '''"""Tools for pots."""
# Copyright (c) 1999 by nobody at all, and all of
# the rights to this work are reserved by him, so
# that you may not do what you want to do with it.

# A pot is a thing with a hole in it, which is
# what makes it useful to those who would like
# to put something into the pot.

# def old(pot):
#     return pot.size
#     self.is_not_used = pot
TEXT = """
# This is no comment, although it is a line
# that starts like one, because it stands in
# a string that goes over some lines.
"""

class Pot(Thing):
    """What one can put things in."""

    # This is on the heels of the method that it
    # describes, so that it is a part of what is
    # said of the method and not of the class.
    @cached
    def fill(self, /, what: str = "tea", *, to=1) -> bool:
        """Fill the pot, up to its rim."""

if True:
    async def drain(pot, *others):
        """drain(pot): Let everything out of it.

            As of now.
        """
'''


def test_docstrings_and_comments_become_sections() -> None:
    module, pot, drain = source_sections(SOURCE.encode(), SeenLines())
    assert module == Section(
        "module",
        "",
        (
            "Tools for pots.",
            "A pot is a thing with a hole in it, which is\nwhat makes it useful to those who would like\n"
            "to put something into the pot.",
        ),
    )
    assert (pot.kind, pot.name) == ("class", "Pot")
    assert pot.blocks[0] == "class Pot(Thing)\nWhat one can put things in."
    assert pot.blocks[1].startswith(
        "Pot.fill(what: str='tea', *, to=1) -> bool\nFill the pot, up to its rim.\n\nThis is on"
    )
    assert drain.blocks == ("drain(pot): Let everything out of it.\n\nAs of now.",)


@pytest.mark.parametrize(
    "source", [b"def f(:\n", b"\xff\xfe", b"a\x00b"], ids=["syntax", "encoding", "null"]
)
def test_a_broken_file_has_no_sections(source: bytes) -> None:
    assert source_sections(source, SeenLines()) == []


def test_tests_tables_and_other_packages_are_not_read(tmp_path: Path) -> None:
    for name in (
        "pots.py",
        "kitchen/__init__.py",
        "kitchen/stove.py",
        "encodings/cp037.py",
        "encodings/idna.py",
        "kitchen/tests/test_stove.py",
        "site-packages/pot.py",
        "_sysconfigdata__linux_.py",
        "config-3.11-linux/python-config.py",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    (tmp_path / "sitecustomize.py").symlink_to(tmp_path / "nowhere.py")
    names = [name for name, _ in source_files(tmp_path)]
    assert names == ["encodings.idna", "kitchen", "kitchen.stove", "pots"]


def test_modules_in_c_are_described_by_class_and_function() -> None:
    sections = {section.name: section for section in builtin_sections("math", SeenLines())}
    assert sections[""].kind == "module"
    assert sections["cos"].blocks == ("cos(x, /)\nReturn the cosine of x (measured in radians).",)
    lists = next(each for each in builtin_sections("builtins", SeenLines()) if each.name == "list")
    assert any(block.startswith("list.append(object, /)\n") for block in lists.blocks)


def test_modules_with_side_effects_are_not_imported() -> None:
    names = builtin_module_names()
    assert names == sorted(names)
    assert {"math", "sys", "_datetime"} <= {*names}
    assert not {"readline", "_tkinter", "xxsubtype", "_testcapi", "_ctypes_test"} & {*names}


def test_a_page_is_neither_crumbs_nor_a_book() -> None:
    small = [Section("function", f"f{number}", ("word " * 40,)) for number in range(50)]
    large = Section("class", "Large", tuple("word " * 100 for _ in range(60)))
    pages = list(make_pages("pots", [*small, large]))
    assert all(2_000 < len(page) < 9_000 for page in pages)
    assert pages[0].startswith("Functions of the module pots\n\n")
    assert [page.partition("\n")[0] for page in pages[-4:]] == [
        "The class pots.Large",
        *["The class pots.Large, continued"] * 3,
    ]
    assert list(make_pages("pots", [Section("module", "", ("Too short to be a page.",))])) == []


def test_tidying_keeps_text_and_drops_drawings() -> None:
    text = (
        "\ufeffA “pot”…\r\n=======\n\n\n\x00It\u2019s \u2014 round.  \n+---+---+\n| a | b |\n"
        + "QUJD" * 30
    )
    assert tidy(text) == 'A "pot"...\n\nIt\'s -- round.'
    assert tidy("<Pot object at 0x7f00deadbeef>") == "<Pot object>"
    assert tidy("half a pair \ud800").encode() == b"half a pair ?"
    assert tidy("----- Pots ----------") == "----- Pots"
    assert tidy("A pot.\n  +\nTea.") == "A pot.\nTea."
    assert tidy(">>> f()\n...\n1 | 2") == ">>> f()\n...\n1 | 2"


def test_prose_is_told_from_code() -> None:
    assert is_prose("This is what we do\nif there is no pot, because\nwithout one there is no tea.")
    assert not is_prose("pot = Pot()\nif pot.full:\n    pot.drain()\nfor each in the_pots:")
    assert not is_prose("Two lines are\nno paragraph of a text that is worth it to be read")
    assert is_readable("Return the pot.")
    assert not is_readable("0x00 0x01 0x02 A B C 0x03")
    assert not is_readable(" ".join(f"Name{chr(65 + number)}" for number in range(26)))


def test_legal_paragraphs_go_and_the_others_stay() -> None:
    text = "Pots.\n\nCopyright (C) 2000 Potter.\nAll rights reserved.\n\nMore pots."
    assert without_legal_paragraphs(text) == "Pots.\n\nMore pots."


def test_a_text_that_is_mostly_known_is_not_new() -> None:
    seen = SeenLines()
    assert seen.is_new("The first line of a text.\nThe second line of a text.")
    assert not seen.is_new("  The first line  of a text.\nshort")
    assert seen.is_new("The first line of a text.\nA line that was never seen, and is longer.")
    assert seen.is_new("short") and not seen.is_new("short")


def test_the_split_is_stable() -> None:
    names = [f"module{number}" for number in range(2_000)]
    share = sum(falls_to_validation(name, 40) for name in names) / len(names)
    assert 0.03 < share < 0.05
    # Pinned: another hash would mix the validation documents of two versions of the package.
    assert [name for name in names if falls_to_validation(name, 1)] == ["module637", "module1660"]
