"""Templates that take all memory or time are refused in a sentence, and the next one runs."""

import os
import resource
import signal
import threading
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from jinja2 import TemplateError

from full_stack_transformer.errors import ModelError, RequestError
from full_stack_transformer.tokenization import template_process
from full_stack_transformer.tokenization.chat import load_chat_template
from full_stack_transformer.tokenization.template_process import run, time_limit
from full_stack_transformer.tokenization.templates import program_of, template_tree

_DOUBLING = "{% set ns = namespace(x='aaaaaaaa') %}{% for i in range(40) %}"
_TAKE_MEMORY = {
    "a repeated text": "{{ 'a' * 10**10 }}",
    "a repeated text that is no constant": "{% set n = messages|length %}{{ 'a' * (n * 10**10) }}",
    "lists": "{% set ns = namespace(x=[]) %}{% for i in range(9999) %}"
    "{% set ns.x = ns.x + [range(99999)|list] %}{% endfor %}",
    "doubled by ~": _DOUBLING + "{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "doubled by +": _DOUBLING + "{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "doubled by join": _DOUBLING + "{% set ns.x = [ns.x, ns.x]|join %}{% endfor %}",
    "doubled by a block": _DOUBLING + "{% set x %}{{ ns.x }}{{ ns.x }}{% endset %}"
    "{% set ns.x = x %}{% endfor %}",
    "replaced": "{% set x = 'a' * 99999 %}{{ x|replace('a', x) }}",
    "formatted": "{{ '%9999999999d' % 1 }}",
    "centred": "{{ 'a'|center(10**10) }}",
    "justified by a method": "{{ 'a'.ljust(10**10) }}",
    "a batch": "{{ [1]|batch(10**10, 0)|list }}",
}
_TAKE_TIME = {
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "a text of lists in lists": "{% set ns = namespace(x=[]) %}{% for i in range(50) %}"
    "{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}",
    "a power": "{{ 7 ** (7 ** 9) }}",
}


def _run(source: str, **variables: Any) -> str:
    return run(program_of(template_tree(source)), {"messages": [1], **variables})


@pytest.mark.parametrize("name", _TAKE_MEMORY)
def test_a_template_that_takes_all_memory_is_refused(name: str) -> None:
    with pytest.raises(RequestError, match=r"the chat template .* memory"):
        _run(_TAKE_MEMORY[name])
    assert _run("{{ messages|length }}") == "1"


@pytest.mark.parametrize(
    "source",
    ["{{ " + "1+" * 20_000 + "1 }}", "{{ a" + ".b" * 5_000 + " }}", "{{ " + "1" * 5_000 + " }}"],
    ids=["a long sum", "a long path", "a long number"],
)
def test_a_template_that_cannot_be_read_is_refused(source: str) -> None:
    with pytest.raises(TemplateError):
        program_of(template_tree(source))


def test_templates_run_beside_a_thousand_connections() -> None:
    template_process._processes.stop()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 4_096)), hard))
    with ExitStack() as stack:
        for _ in range(1_030):
            stack.enter_context(Path(os.devnull).open())
        assert _run("{{ messages|length }}") == "1"
    template_process._processes.stop()


@pytest.mark.parametrize("name", _TAKE_TIME)
def test_a_template_that_takes_all_time_is_refused(name: str) -> None:
    """Also inside of a function of C, where no signal handler of Python runs."""
    with time_limit(0.1), pytest.raises(RequestError, match=r"takes more than 0.1 s"):
        _run(_TAKE_TIME[name])
    assert _run("{{ messages|length }}") == "1"


def test_a_template_that_writes_without_end_is_refused() -> None:
    with pytest.raises(RequestError, match="writes more than 16,777,216 characters"):
        _run("{{ 'a' * 2**25 }}")


def test_the_seconds_of_several_templates_add_up() -> None:
    with time_limit(0.2), pytest.raises(RequestError, match=r"takes more than 0.2 s"):
        for _ in range(200):
            _run("{% for a in range(99999) %}{% endfor %}")


def test_a_killed_process_is_told_and_replaced() -> None:
    assert _run("{{ messages }}") == "[1]"
    process = template_process._processes._process
    assert process is not None
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert _run("{{ messages }}") == "[1]"


def test_threads_and_forks_get_their_own_answers() -> None:
    found: dict[int, str] = {}

    def work(number: int) -> None:
        for _ in range(20):
            found[number] = _run("{{ messages[0] }}", messages=[number])

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {number: str(number) for number in range(4)}
    reading, writing = os.pipe()
    if (child := os.fork()) == 0:
        os.write(writing, _run("{{ messages }}", messages=["fork"]).encode())
        template_process._processes.stop()
        os._exit(0)
    assert _run("{{ messages }}") == "[1]"
    os.waitpid(child, 0)
    assert os.read(reading, 100) == b"['fork']"


def test_modules_of_the_working_directory_are_not_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "json.py").write_text("raise SystemExit(3)")
    monkeypatch.chdir(tmp_path)
    template_process._processes.stop()
    assert _run("{{ messages }}") == "[1]"


@pytest.mark.parametrize(
    "source", ["{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "a" * (1 << 20 | 1), "{% if %}"]
)
def test_a_source_that_cannot_be_read_is_refused_when_the_model_is_opened(
    source: str, tmp_path: Path
) -> None:
    (tmp_path / "chat_template.jinja").write_text(source)
    with pytest.raises(ModelError, match="the chat template is not valid Jinja"):
        load_chat_template(tmp_path)


def test_programs_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_process, "_MAX_PROGRAMS", 3)
    for number in range(10):
        assert _run(f"{{{{ messages }}}}{number}") == f"[1]{number}"
        assert len(template_process._processes._known) <= 3
