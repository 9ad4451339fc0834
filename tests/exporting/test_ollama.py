"""Modelfiles: the Go template renders what the Jinja template renders, or is refused."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from full_stack_transformer.arguments.exporting import ExportArguments
from full_stack_transformer.errors import ModelError
from full_stack_transformer.exporting.command import main
from full_stack_transformer.exporting.ollama import Messages, _conversations, turns_of
from full_stack_transformer.exporting.source import Source, open_source
from tests.exporting.small_exports import make_model
from tests.tokenization.families import FAMILIES

WRITTEN = ("chatml", "llama_3", "gemma", "phi", "zephyr", "olmo", "command")
REFUSED = ("mistral", "smollm_3", "granite")
_GO = """package main
import ("encoding/json"; "os"; "text/template")
type M struct { Role, Content string }
func main() {
    var asked struct { Template string; Chats [][]M }
    if e := json.NewDecoder(os.Stdin).Decode(&asked); e != nil { panic(e) }
    parsed := template.Must(template.New("").Parse(asked.Template))
    var rendered []string
    for _, chat := range asked.Chats {
        system := ""
        for _, m := range chat { if m.Role == "system" { system += m.Content } }
        file, _ := os.CreateTemp("", "")
        values := map[string]any{"System": system, "Messages": chat, "Response": ""}
        if e := parsed.Execute(file, values); e != nil { panic(e) }
        text, _ := os.ReadFile(file.Name())
        os.Remove(file.Name())
        rendered = append(rendered, string(text))
    }
    json.NewEncoder(os.Stdout).Encode(rendered)
}
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("llama", tmp_path_factory.mktemp("models") / "chat")


def _with_template(model: Path, directory: Path, template: str | None) -> Source:
    shutil.copytree(model, directory)
    shutil.rmtree(directory / "additional_chat_templates")
    if template is None:
        (directory / "chat_template.jinja").unlink()
    else:
        (directory / "chat_template.jinja").write_text(template)
    return open_source(ExportArguments(directory, format="ollama", output=directory / "no"))


@pytest.mark.parametrize("name", WRITTEN)
def test_the_turns_of_a_template_are_found(name: str, model: Path, tmp_path: Path) -> None:
    family = FAMILIES[name]
    turns = turns_of(_with_template(model, tmp_path / name, family.template))
    assert ("system" in turns.around) == family.has_system
    assert "{{ range .Messages }}" in turns.go_template()


@pytest.mark.parametrize("name", REFUSED)
def test_a_template_that_does_more_is_refused(name: str, model: Path, tmp_path: Path) -> None:
    source = _with_template(model, tmp_path / name, FAMILIES[name].template)
    with pytest.raises(ModelError, match="cannot be written for Ollama"):
        turns_of(source)


def test_a_model_without_a_template_gets_the_plain_form(model: Path, tmp_path: Path) -> None:
    turns = turns_of(_with_template(model, tmp_path / "plain", None))
    chat: Messages = [{"role": "user", "content": "Hi"}]
    assert turns.rendered(chat) == "User: Hi\nAssistant:"


def test_a_modelfile_has_template_stops_and_settings(model: Path, tmp_path: Path) -> None:
    settings = {"do_sample": True, "temperature": 0.2, "top_p": 0.9, "eos_token_id": [2, 0]}
    directory = tmp_path / "model"
    shutil.copytree(model, directory)
    (directory / "generation_config.json").write_text(json.dumps(settings))
    output = main(
        ExportArguments(
            directory, format="ollama", output=tmp_path / "out", dtype="q8_0", check=False
        )
    )
    assert sorted(file.name for file in output.iterdir()) == ["Modelfile", "model.gguf"]
    lines = (output / "Modelfile").read_text().splitlines()
    assert "FROM ./model.gguf" in lines
    assert 'PARAMETER stop "<|im_end|>"' in lines
    assert 'PARAMETER stop "<|endoftext|>"' in lines
    assert "PARAMETER temperature 0.2" in lines
    assert any(line.startswith('TEMPLATE """{{ range .Messages }}') for line in lines)


@pytest.mark.slow
def test_go_renders_the_same(model: Path, tmp_path: Path) -> None:
    go = shutil.which("go")
    if go is None:
        pytest.skip("no Go here: apt-get install golang-go")
    program = tmp_path / "render.go"
    program.write_text(_GO)
    binary = tmp_path / "render"
    environment = {**os.environ, "GOCACHE": str(tmp_path / "cache"), "GOFLAGS": "-mod=mod"}
    subprocess.run([go, "build", "-o", binary, program], check=True, env=environment)
    for name in (*WRITTEN, "none"):
        template = FAMILIES[name].template if name in FAMILIES else None
        source = _with_template(model, tmp_path / name, template)
        turns = turns_of(source)
        chats = _conversations(with_system="system" in turns.around)
        asked = {
            "Template": turns.go_template(),
            "Chats": [[{key.title(): one[key] for key in one} for one in chat] for chat in chats],
        }
        done = subprocess.run(
            [binary], input=json.dumps(asked), capture_output=True, text=True, check=True
        )
        begin = source.tokenizer.prefix
        for chat, rendered in zip(chats, json.loads(done.stdout), strict=True):
            jinja = source.template.text(chat, source.tokenizer, add_generation_prompt=True)
            assert jinja in (rendered, begin + rendered), name
