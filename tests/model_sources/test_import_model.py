"""Every kind of source becomes a model directory that computes the same, and nothing of it is run."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from full_stack_transformer.arguments.models import ImportModelArguments
from full_stack_transformer.errors import ModelError, UsageError
from full_stack_transformer.generation.text_generator import TextGenerator
from full_stack_transformer.model_sources.import_model import main as import_model
from full_stack_transformer.modelling.pretrained import LOADING_ERRORS
from tests.chat_model import make_chat_model
from tests.conftest import RunFst
from tests.model_sources.gguf_files import NUM_HEADS, QUANTISATIONS, WIDTH, write_gguf

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def original(documents_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    text = (documents_dir / "train.txt").read_text()
    return make_chat_model(tmp_path_factory.mktemp("original") / "chatty", text)


@pytest.fixture
def source(original: Path, tmp_path: Path) -> Path:
    """A copy to change."""
    shutil.copytree(original, tmp_path / "chatty")
    return tmp_path / "chatty"


@pytest.fixture
def bring(tmp_path: Path) -> Callable[..., Path]:
    def run(source: Path | str, **options: Any) -> Path:
        return import_model(
            ImportModelArguments(str(source), models_root=tmp_path / "models", **options)
        )

    return run


def logits(directory: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.inference_mode():
        output: torch.Tensor = model(torch.tensor([[5, 30, 9, 280]])).logits
    return output


def test_a_directory_is_copied_without_its_code(
    source: Path, bring: Callable[..., Path], run_fst: RunFst
) -> None:
    before = {file.name: file.read_bytes() for file in source.iterdir() if file.is_file()}
    config = json.loads(before["config.json"])
    own = {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}
    (source / "config.json").write_text(json.dumps({**config, "auto_map": own}))
    (source / "own.py").write_text("raise SystemExit('was run')")
    (source / "training_args.bin").write_bytes(pickle.dumps({}))
    (source / "LICENSE").write_text("MIT")
    target = bring(source)
    assert target.name == "chatty"
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", WEIGHTS):
        assert (target / name).read_bytes() == before[name]
    assert (target / "additional_chat_templates/tool_use.jinja").is_file()
    assert json.loads((target / "config.json").read_text()) == config
    assert (target / "LICENSE").read_text() == "MIT"
    assert not {"own.py", "training_args.bin"} & {file.name for file in target.iterdir()}
    description = json.loads((target / "description.json").read_text())
    assert description["imported_from"] == str(source)
    # The other commands open it.
    done = run_fst("generate", target, "--prompt", "Nr", "--max_new_tokens", "3", "--seed", "1")
    assert done.returncode == 0, done.stderr
    with pytest.raises(UsageError, match="exists; remove it, or choose another name"):
        bring(source)
    assert bring(source, model_name="again", dtype="float32").name == "again"
    assert load_file(target.parent / "again" / WEIGHTS)["model.norm.weight"].dtype == torch.float32


def test_a_pickle_is_read_as_tensors_alone(source: Path, bring: Callable[..., Path]) -> None:
    weights = load_file(source / WEIGHTS)
    (source / WEIGHTS).unlink()
    torch.save(weights, source / "pytorch_model.bin")
    target = bring(source, model_name="good")
    assert not (target / "pytorch_model.bin").exists()
    found = load_file(target / WEIGHTS)
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], weights[name]) for name in weights)
    assert (target / "generation_config.json").is_file()

    class Harm:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (source / "was run",))

    torch.save({**weights, "harm": Harm()}, source / "pytorch_model.bin")
    with pytest.raises(ModelError, match="code, which is never run"):
        bring(source, model_name="bad")
    assert not (source / "was run").exists()
    assert [path.name for path in target.parent.iterdir()] == ["good"]


def test_shards_are_copied_and_a_missing_one_is_named(
    source: Path, bring: Callable[..., Path]
) -> None:
    expected = logits(source)
    model = AutoModelForCausalLM.from_pretrained(source)
    (source / WEIGHTS).unlink()
    model.generation_config = GenerationConfig()
    model.save_pretrained(source, max_shard_size="40KB")
    shards = sorted(source.glob("model-*.safetensors"))
    assert len(shards) > 1
    target = bring(source, model_name="whole")
    assert {one.name for one in shards} < {one.name for one in target.iterdir()}
    assert torch.equal(logits(target), expected)
    shards[1].unlink()
    with pytest.raises(ModelError, match="lacks 1 of"):
        bring(source, model_name="half")


def test_all_quantisations_of_gguf_are_read(
    original: Path, tmp_path: Path, bring: Callable[..., Path]
) -> None:
    file = tmp_path / "tiny.gguf"
    kinds = [*QUANTISATIONS, GGMLQuantizationType.F16]
    expected = write_gguf(file, original, kinds=kinds)
    target = bring(file)
    assert target.name == "tiny"
    found = load_file(target / WEIGHTS)
    names = {
        "attn_output": "self_attn.o_proj",
        "attn_v": "self_attn.v_proj",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
    }
    for name, values in expected.items():
        parts = name.split(".")
        if parts[0] != "blk" or parts[2] not in names:
            continue
        if parts[2] in ("attn_q", "attn_k"):  # llama.cpp interleaves the halves of a head
            values = values.reshape(NUM_HEADS, WIDTH // NUM_HEADS // 2, 2, WIDTH)
            values = values.swapaxes(1, 2).reshape(WIDTH, WIDTH)
        ours = found[f"model.layers.{parts[1]}.{names[parts[2]]}.weight"].numpy()
        assert np.array_equal(ours, values), name
    assert np.array_equal(found["model.embed_tokens.weight"].numpy(), expected["token_embd.weight"])
    description = json.loads((target / "description.json").read_text())
    assert {kind.name for kind in kinds} <= set(description["gguf_types"])
    # It can be saved, tuned and served as any other; its tokenizer is that of the file.
    assert "quantization_config" not in json.loads((target / "config.json").read_text())
    ours, theirs = (AutoTokenizer.from_pretrained(one) for one in (target, original))
    text = "The weather, in 2024: <|im_end|>"
    assert ours(text).input_ids == theirs(text).input_ids
    assert (ours.chat_template, ours.model_max_length) == (
        (original / "chat_template.jinja").read_text(),
        128,
    )
    assert GenerationConfig.from_pretrained(target).eos_token_id == [2, 0]
    generator = TextGenerator.open(target, device="cpu")
    assert generator.generate("Nr", max_new_tokens=2, seed=1)


def test_a_gguf_of_halves_keeps_its_type_and_stretched_positions(
    original: Path, tmp_path: Path, bring: Callable[..., Path]
) -> None:
    (tmp_path / "folder").mkdir()
    for name in ("a.gguf", "b.gguf"):
        file = tmp_path / "folder" / name
        write_gguf(file, original, kinds=[GGMLQuantizationType.F16], with_divisors=True)
    with pytest.raises(UsageError, match=r"holds a\.gguf, b\.gguf; choose one with --file"):
        bring(tmp_path / "folder")
    target = bring(tmp_path / "folder", file="b.gguf")
    assert load_file(target / WEIGHTS)["model.norm.weight"].dtype == torch.float16
    rope = json.loads((target / "config.json").read_text())["rope_parameters"]
    assert (rope["rope_type"], rope["factor"], rope["rope_theta"]) == ("llama3", 8.0, 10_000.0)
    file.write_bytes(file.read_bytes()[:100_000])
    with pytest.raises(ModelError, match="damaged or unfinished GGUF"):
        bring(file)
    file.write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(ModelError, match="damaged or unfinished GGUF"):
        bring(file)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT's use of transformers
@pytest.mark.parametrize("names_base", [True, False], ids=["named", "typed"])
def test_an_adapter_is_merged_into_its_base(
    names_base: bool, source: Path, tmp_path: Path, bring: Callable[..., Path]
) -> None:
    peft = pytest.importorskip("peft")
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    torch.manual_seed(1)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, config)
    with torch.inference_mode():
        expected = adapted(torch.tensor([[5, 30, 9, 280]])).logits
    adapter = tmp_path / "lora"
    adapted.save_pretrained(adapter)
    content = json.loads((adapter / "adapter_config.json").read_text())
    content["base_model_name_or_path"] = str(source) if names_base else None
    content["megatron_core"] = "not_a_module"
    content["megatron_config"] = {"x": 1}
    (adapter / "adapter_config.json").write_text(json.dumps(content))
    before = (source / WEIGHTS).read_bytes()
    options = {} if names_base else {"base": str(source)}
    target = bring(adapter, dtype="float32", **options)
    assert torch.allclose(logits(target), expected, atol=1e-5)
    assert (source / WEIGHTS).read_bytes() == before
    assert (target / "chat_template.jinja").is_file()
    if not names_base:
        other = make_chat_model(tmp_path / "other", "a b c\n" * 50, num_hidden_layers=1)
        with pytest.raises(
            ModelError, match="4 of its matrices have no place there, 0 are missing"
        ):
            bring(adapter, model_name="wrong", base=str(other))
        with pytest.raises(ModelError, match="names no base_model_name_or_path; pass --base"):
            bring(adapter, model_name="without")
    assert json.loads((target / "description.json").read_text())["base"] == str(source)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda path: (path / "config.json").unlink(), "without config.json"),
        (lambda path: (path / "tokenizer.json").unlink(), "tokenizer"),
        (lambda path: (path / WEIGHTS).unlink(), "no weights"),
        (
            lambda path: (path / WEIGHTS).write_bytes((path / WEIGHTS).read_bytes()[:-100]),
            "is cut off",
        ),
    ],
    ids=["no config", "no tokenizer", "no weights", "cut"],
)
def test_half_a_directory_is_refused(
    change: Callable[[Path], object], sentence: str, source: Path, bring: Callable[..., Path]
) -> None:
    change(source)
    with pytest.raises(Exception, match=sentence) as refusal:
        bring(source)
    assert not isinstance(refusal.value, LOADING_ERRORS)
    assert not list((source.parent / "models").iterdir())


def test_weights_that_are_no_numbers_are_refused(source: Path, bring: Callable[..., Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(source)
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    model.generation_config = GenerationConfig()
    model.save_pretrained(source)
    with pytest.raises(ModelError, match="scores that are not finite"):
        bring(source)
