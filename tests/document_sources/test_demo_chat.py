"""The demo of fine-tuning, from a tiny model to its table; the commands run in this process."""

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import pytest

from full_stack_transformer.arguments.data import DemoArguments
from full_stack_transformer.command_line import run
from full_stack_transformer.document_sources import demo_chat
from tests.chat_model import make_chat_model


def _row(number: int) -> dict[str, Any]:
    asked = {"role": "user", "content": f"What is {number} and one?"}
    answer = {"role": "assistant", "content": f"It is {number + 1}."}
    return {"messages": [asked, answer], "kind": "sum"}


def test_the_demo_compares_a_model_before_and_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Everything but the downloads and the service, with steps of a few seconds."""
    commands = []

    def run_here(*words: str) -> None:
        commands.append(words[0])
        assert run(list(words)) == 0

    def run_here_for_json(*words: str) -> Any:
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            run_here(*words)
        return json.loads(printed.getvalue())

    monkeypatch.setattr(demo_chat, "run", run_here)
    monkeypatch.setattr(demo_chat, "run_for_json", run_here_for_json)
    make_chat_model(tmp_path / "models" / "smollm2", " ".join(f"What is {i}" for i in range(99)))
    rows = tmp_path / "documents" / "python_docs_supervised_fine_tuning"
    texts = [tmp_path / "documents" / name for name in ("python_docs", "package_descriptions")]
    for directory in (rows, *texts):
        directory.mkdir(parents=True)
    for name, numbers in (("train", range(40)), ("valid", range(40, 52))):
        content = "".join(json.dumps(_row(number)) + "\n" for number in numbers)
        (rows / f"{name}.jsonl").write_text(content)
        for directory in texts:
            text = "What is and is not a text?\n[END_OF_DOCUMENT]\n" * 40
            (directory / f"{name}.txt").write_text(text)
    arguments = DemoArguments(root=tmp_path, serve=False, minutes=0.05)
    assert demo_chat.main(arguments) == 0
    assert list(dict.fromkeys(commands)) == ["prepare_dataset", "train", "evaluate"]
    shown = capsys.readouterr().out
    assert shown.count("\n    before  ") == shown.count("\n    right   It is ") == 12
    lines = {line[2:42].strip(): line[42:].split() for line in shown.splitlines()}
    assert lines["held-out questions answered right"][1] == "%"
    assert lines["perplexity of general text"][-1] == "%"

    commands.clear()
    demo_chat.main(arguments)  # what is finished is used again
    assert set(commands) == {"evaluate"}
