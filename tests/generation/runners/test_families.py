"""Every family of the C++ decoder: transformers' numbers, and PyTorch where a configuration asks for more."""

import random
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers import PreTrainedModel as Backbone

from full_stack_transformer.errors import ModelError
from full_stack_transformer.generation.runners.native import families, library
from full_stack_transformer.generation.runners.native.decoder import (
    NativeRunner,
    WeightsDtype,
    why_not_native,
)
from full_stack_transformer.generation.runners.torch import SequenceWork
from full_stack_transformer.machine import instruction_sets
from tests.generation.small_models import varied_backbone

CONTEXT, VOCABULARY = 70, 77
# Of 16 numbers, heads and windows there is always a rest.
NUM_BLOCKS = -(-CONTEXT // 16)
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 96,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "max_position_embeddings": CONTEXT,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
GROUPED, EQUAL = {**SIZES, "num_key_value_heads": 1}, {**SIZES, "num_key_value_heads": 3}
SLIDING, FULL = "sliding_attention", "full_attention"
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
}
GEMMA = {**GROUPED, "head_dim": 48, "query_pre_attn_scalar": 30, "sliding_window": 18}
CONFIGS: dict[str, Callable[[], PretrainedConfig]] = {
    "mistral": lambda: transformers.MistralConfig(**GROUPED, sliding_window=21),
    "mistral-wide": lambda: transformers.MistralConfig(**EQUAL, head_dim=48, sliding_window=None),
    "qwen2": lambda: transformers.Qwen2Config(
        **EQUAL, use_sliding_window=True, sliding_window=17, max_window_layers=1
    ),
    "qwen3": lambda: transformers.Qwen3Config(
        **GROUPED, head_dim=48, attention_bias=True, rope_parameters=YARN
    ),
    "qwen3-tied": lambda: transformers.Qwen3Config(**GROUPED, tie_word_embeddings=True),
    "gemma2": lambda: transformers.Gemma2Config(
        **GEMMA, attn_logit_softcapping=5.0, final_logit_softcapping=3.0, attention_bias=True
    ),
    "gemma3": lambda: transformers.Gemma3TextConfig(
        **GEMMA,
        layer_types=[SLIDING, FULL, SLIDING],
        rope_parameters={
            SLIDING: {"rope_type": "default", "rope_theta": 100.0},
            FULL: {"rope_type": "linear", "rope_theta": 1e4, "factor": 8.0},
        },
    ),
    "gemma3-capped": lambda: transformers.Gemma3TextConfig(
        **GEMMA, final_logit_softcapping=2.0, tie_word_embeddings=False, hidden_activation="gelu"
    ),
    "phi3": lambda: transformers.Phi3Config(
        **GROUPED,
        sliding_window=33,
        rope_parameters={"rope_theta": 1e4, "partial_rotary_factor": 0.5},
    ),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**SIZES),
    "gpt_neox-in-turn": lambda: transformers.GPTNeoXConfig(
        **SIZES, use_parallel_residual=False, attention_bias=False, hidden_act="gelu_new"
    ),
    "smollm3": lambda: transformers.SmolLM3Config(
        **GROUPED, no_rope_layer_interval=2, use_sliding_window=True, sliding_window=20
    ),
    "smollm3-biases": lambda: transformers.SmolLM3Config(
        **GROUPED, no_rope_layers=[0, 1, 1], attention_bias=True, mlp_bias=True
    ),
    "olmo2": lambda: transformers.Olmo2Config(**GROUPED, attention_bias=True),
    "granite": lambda: transformers.GraniteConfig(
        **GROUPED,
        embedding_multiplier=3.0,
        residual_multiplier=0.4,
        attention_multiplier=0.3,
        logits_scaling=0.7,
        mlp_bias=True,
    ),
    "olmo": lambda: transformers.OlmoConfig(**GROUPED),
    "phi": lambda: transformers.PhiConfig(**GROUPED),
    "stablelm": lambda: transformers.StableLmConfig(**GROUPED, use_qkv_bias=True),
    "starcoder2": lambda: transformers.Starcoder2Config(**GROUPED, sliding_window=19),
}


pytestmark = pytest.mark.usefixtures("decoder")


@cache
def _backbone(name: str) -> Backbone:
    return varied_backbone(CONFIGS[name]())


def _text(length: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()


def _theirs(backbone: Backbone, token_ids: Sequence[int]) -> Tensor:
    """Without a cache."""
    with torch.inference_mode():
        logits: Tensor = backbone(torch.tensor([list(token_ids)]), use_cache=False).logits[0]
    return logits


def _runner(backbone: Backbone, dtype: WeightsDtype) -> NativeRunner:
    return NativeRunner(
        backbone,
        num_blocks=NUM_BLOCKS,
        block_size=16,
        weights_dtype=dtype,
        kv_dtype="float32" if dtype == "float32" else "bfloat16",
    )


def _ours(runner: NativeRunner, token_ids: Sequence[int], start: int = 0) -> Tensor:
    return runner.run([SequenceWork(range(NUM_BLOCKS), start, token_ids, len(token_ids))])


# ------------------------------------------------------------------ the numbers


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_those_of_transformers(name: str) -> None:
    backbone = _backbone(name)
    tolerances: dict[WeightsDtype, float] = {"float32": 1e-5, "bfloat16": 0.05, "int8": 0.15}
    text = _text(CONTEXT, seed=1)
    expected = _theirs(backbone, text)
    for dtype, tolerance in tolerances.items():
        runner = _runner(backbone, dtype)
        whole = _ours(runner, text)
        assert float((whole - expected).norm() / expected.norm()) < tolerance, dtype
        # In pieces that begin and end within blocks and windows.
        pieces = [_ours(runner, text[:23]), _ours(runner, text[23:24], 23)]
        assert torch.equal(torch.cat([*pieces, _ours(runner, text[24:], 24)]), whole), dtype


@pytest.mark.parametrize("name", CONFIGS)
def test_twenty_likeliest_tokens_are_those_of_transformers(name: str) -> None:
    backbone = _backbone(name)
    runner = _runner(backbone, "float32")
    ours, theirs = _text(30, seed=2), _text(30, seed=2)
    logits = _ours(runner, ours)
    for _ in range(20):
        ours.append(int(logits[-1].argmax()))
        theirs.append(int(_theirs(backbone, theirs)[-1].argmax()))
        logits = _ours(runner, ours[-1:], len(ours) - 1)
    assert ours == theirs


@pytest.fixture(scope="module")
def computed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """x -> what functions.cpp makes of it, with the instructions of this machine and with none."""
    compiler = library._compiler()
    if compiler is None:
        pytest.skip("there is no C++ compiler")
    x = torch.cat(
        [
            torch.linspace(-12, 12, 24_000),
            torch.logspace(-30, 30, 3_000),
            -torch.logspace(-30, 30, 3_000),
            torch.tensor([0.0, -0.0] * 8),
        ]
    )
    results = []
    native = Path(library.__file__).parent
    for isa in (next(isa for isa in instruction_sets() if isa in library.targets()), "plain"):
        program = tmp_path_factory.mktemp("functions") / isa
        flags = [flag for flag in library._flags(isa) if flag not in ("-shared", "-O3")]
        source = Path(__file__).with_name("functions.cpp")
        subprocess.run([compiler, *flags, "-O1", "-I", native, source, "-o", program], check=True)
        done = subprocess.run([program], input=x.numpy().tobytes(), capture_output=True, check=True)
        results.append(torch.frombuffer(bytearray(done.stdout), dtype=torch.float32).view(4, -1))
    assert torch.equal(*results)
    return dict(zip(("x", "gelu", "gelu by tanh", "silu", "tanh"), [x, *results[0]], strict=True))


@pytest.mark.parametrize(
    ("name", "exact"),
    [
        ("gelu", nn.functional.gelu),
        ("gelu by tanh", partial(nn.functional.gelu, approximate="tanh")),
        ("silu", nn.functional.silu),
        ("tanh", torch.tanh),
    ],
)
def test_activations_are_exact_to_a_millionth(
    name: str, exact: Callable[[Tensor], Tensor], computed: dict[str, Tensor]
) -> None:
    """Relative to the larger of input and output; tanh relative to itself."""
    expected = exact(computed["x"].double())
    size = expected.abs() if name == "tanh" else computed["x"].double().abs()
    difference = (computed[name] - expected).abs() / size.clamp(min=1e-30)
    assert float(difference.max()) < 1e-6


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("name", ["gemma2", "gpt_neox"])
def test_company_and_cuts_change_no_bit(name: str, dtype: WeightsDtype) -> None:
    """Of neighbouring tokens that are computed together each has its own window."""
    numbers = random.Random(3)
    texts = [_text(length, seed=length) for length in (70, 61, 33, 18, 5)]
    runner = NativeRunner(
        _backbone(name),
        num_blocks=len(texts) * NUM_BLOCKS,
        block_size=16,
        weights_dtype=dtype,
        kv_dtype="float32" if dtype == "float32" else "bfloat16",
    )
    alone = [_ours(_runner(_backbone(name), dtype), text) for text in texts]
    blocks = numbers.sample(range(len(texts) * NUM_BLOCKS), len(texts) * NUM_BLOCKS)
    tables = [blocks[number::5] for number in range(5)]
    done, rows = [0] * 5, [[torch.zeros(0, VOCABULARY)] for _ in texts]
    while any(done[number] < len(text) for number, text in enumerate(texts)):
        work = {}
        for number, text in enumerate(texts):
            piece = text[done[number] : done[number] + numbers.choice((0, 1, 2, 7, 13, 30))]
            if piece:
                work[number] = SequenceWork(tables[number], done[number], piece, len(piece))
                done[number] += len(piece)
        lengths = [len(one.token_ids) for one in work.values()]
        if work:
            logits = torch.split(runner.run(list(work.values())), lengths)
            for number, part in zip(work, logits, strict=True):
                rows[number].append(part)
    for number, expected in enumerate(alone):
        assert torch.equal(torch.cat(rows[number]), expected), number


# ------------------------------------------------------------------ what goes through PyTorch


class OwnModel(transformers.LlamaForCausalLM):
    """A class of somebody's own, whose layers may do anything."""


class OwnLinear(nn.Linear):
    """As those of packed or adapted weights."""


def _with_own_linear() -> Backbone:
    backbone = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))
    mlp: Any = backbone.get_submodule("model.layers.1.mlp")
    mlp.up_proj = OwnLinear(96, 112, bias=False)
    return backbone


def _with_layers_that_differ() -> Backbone:
    backbone = _of("llama")()
    backbone.config.per_layer_config = {1: {"intermediate_size": 64}}
    return backbone


def _of(kind: str, **changes: Any) -> Callable[[], Backbone]:
    """A model of this family, whose configuration also says something."""

    def make() -> Backbone:
        sizes = (GEMMA if kind.startswith("gemma") else EQUAL) | changes
        config = transformers.AutoConfig.for_model(kind, **sizes)
        return transformers.AutoModelForCausalLM.from_config(config)

    return make


LONG = [1.0] * 16
REFUSED: dict[str, tuple[Callable[[], Backbone], str]] = {
    "family": (_of("cohere"), "not cohere"),
    "class": (lambda: OwnModel(transformers.LlamaConfig(**SIZES)), "not OwnModel"),
    "linear": (_with_own_linear, "layers of class OwnLinear"),
    "activation": (_of("llama", hidden_act="relu"), "not relu"),
    "both ways": (_of("llama", is_causal=False), "its is_causal is False"),
    "gemma both ways": (
        _of("gemma3_text", use_bidirectional_attention=True),
        "use_bidirectional_attention is True",
    ),
    "gemma 3's cap": (
        _of("gemma3_text", attn_logit_softcapping=50.0),
        "attn_logit_softcapping is 50.0",
    ),
    "cross attention": (_of("gpt2", add_cross_attention=True), "add_cross_attention is True"),
    "scaled by layer": (
        _of("gpt2", scale_attn_by_inverse_layer_idx=True),
        "scale_attn_by_inverse_layer_idx is True",
    ),
    "not scaled": (_of("gpt2", scale_attn_weights=False), "scale_attn_weights is False"),
    "layers that differ": (_with_layers_that_differ, "is_heterogeneous is True"),
    "kind of layer": (
        _of("qwen3", layer_types=[FULL, "chunked_attention", FULL], head_dim=32),
        "layers of chunked_attention",
    ),
    "no window": (
        _of("qwen2", layer_types=[FULL, SLIDING, FULL]),
        "its sliding_window is None",
    ),
    "long": (
        _of(
            "phi3",
            rope_parameters={
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "partial_rotary_factor": 1.0,
                "short_factor": LONG,
                "long_factor": LONG,
                "original_max_position_embeddings": 32,
            },
        ),
        "rotary positions depend on the length",
    ),
    "dynamic": (
        _of("llama", rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}),
        "rotary positions depend on the length",
    ),
    "clip": (_of("olmo", clip_qkv=1.0), "clip_qkv is 1.0"),
    "norms of queries": (_of("phi", qk_layernorm=True), "qk_layernorm is True"),
    "parallel": (_of("stablelm", use_parallel_residual=True), "use_parallel_residual is True"),
    "sizes": (_of("llama", intermediate_size=100), "no multiples of 16"),
    "heads": (_of("llama", num_key_value_heads=2), "3 heads of queries do not share 2 of keys"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_it_does_not_know_it_says(name: str) -> None:
    make, reason = REFUSED[name]
    backbone = make().eval()
    problem = why_not_native(backbone)
    assert problem is not None and reason in problem
    with pytest.raises(ModelError, match="cannot run this model here"):
        _runner(backbone, "float32")


# Fields that change nothing of what is computed, or that the sizes of the weights show.
OF_NO_ACCOUNT = {
    *("vocab_size", "hidden_size", "intermediate_size", "n_embd", "n_layer", "n_head", "n_inner"),
    *("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"),
    *("max_position_embeddings", "n_positions", "original_max_position_embeddings"),
    *("initializer_range", "use_cache", "pad_token_id", "bos_token_id", "eos_token_id"),
    *("tie_word_embeddings", "attention_bias", "mlp_bias", "pretraining_tp"),
    # Dropout, which is off.
    *("attention_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop", "hidden_dropout"),
    *("residual_dropout", "embedding_dropout", "use_bias", "use_qkv_bias"),
    *("classifier_dropout", "dtype", "id2label", "label2id", "problem_type", "architectures"),
    *("transformers_version", "output_hidden_states", "return_dict", "chunk_size_feed_forward"),
    # What layer_types and no_rope_layers follow from.
    *("use_sliding_window", "max_window_layers", "no_rope_layer_interval"),
    # The same numbers computed in another way, and heads for other tasks.
    *("reorder_and_upcast_attn", "is_decoder", "summary_type", "summary_use_proj"),
    *("summary_activation", "summary_proj_to_labels", "summary_first_dropout"),
}


@pytest.mark.parametrize("kind", families.FAMILIES)
def test_every_field_of_a_configuration_is_read_or_of_no_account(kind: str) -> None:
    """A field that a new version of transformers adds must be looked at."""
    family = families.FAMILIES[kind]
    config = transformers.AutoConfig.for_model(kind)
    read = {value for value in vars(family).values() if isinstance(value, str)}
    read |= {*family.plain, *families.PLAIN, "rope_parameters"}
    if family.windows != "none":
        read |= {"sliding_window", "layer_types"}
    names = {field.name for field in fields(config)}
    assert names - read - OF_NO_ACCOUNT == set()
