"""Small models of every family that GGUF files are written of, with a chat tokenizer of 320 tokens."""

import json
from collections.abc import Callable
from pathlib import Path

import transformers
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.trainers import BpeTrainer
from transformers import PretrainedConfig, PreTrainedTokenizerFast

from tests.chat_model import CHAT_TEMPLATE, CONTROL_TOKENS, NUM_EMBEDDINGS, make_chat_tokenizer
from tests.generation.small_models import varied_backbone

_SIZES = {
    "vocab_size": NUM_EMBEDDINGS,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
_GROUPED = {**_SIZES, "num_key_value_heads": 2}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_GEMMA = {**_GROUPED, "head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 12}
CONFIGS: dict[str, Callable[[], PretrainedConfig]] = {
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=NUM_EMBEDDINGS, n_positions=128, n_embd=64, n_layer=2, n_head=4
    ),
    "llama": lambda: transformers.LlamaConfig(**_GROUPED, tie_word_embeddings=True),
    "llama3": lambda: transformers.LlamaConfig(
        **_GROUPED, head_dim=32, rope_parameters=_LLAMA3, attention_bias=True
    ),
    "llama-linear": lambda: transformers.LlamaConfig(
        **_SIZES, rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
    ),
    "mistral": lambda: transformers.MistralConfig(**_GROUPED, sliding_window=100),
    "granite": lambda: transformers.GraniteConfig(
        **_GROUPED,
        embedding_multiplier=3.0,
        residual_multiplier=0.4,
        attention_multiplier=0.3,
        logits_scaling=0.7,
    ),
    "smollm3": lambda: transformers.SmolLM3Config(**_GROUPED),
    "qwen2": lambda: transformers.Qwen2Config(**_GROUPED),
    "qwen3": lambda: transformers.Qwen3Config(**_GROUPED, head_dim=32, tie_word_embeddings=True),
    "olmo2": lambda: transformers.Olmo2Config(**_GROUPED),
    "gemma2": lambda: transformers.Gemma2Config(
        **_GEMMA, attn_logit_softcapping=5.0, final_logit_softcapping=3.0
    ),
    "gemma3": lambda: transformers.Gemma3TextConfig(
        **{**_GEMMA, "num_hidden_layers": 7},
    ),
}


def make_model(name: str, directory: Path) -> Path:
    """Write a model directory with weights that make every part of the family matter."""
    make_chat_tokenizer(directory, "The reader learns from the documents. " * 20)
    varied_backbone(CONFIGS[name]()).save_pretrained(directory)
    return directory


# ---------------------------------------------------------------------- tokenizers

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+"
_END = "| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
TEXTS = [
    "The reader's documents, in 2024: 12,345 words. Don't stop!\n\n  def f(x):\n\treturn x ** 2",
    "café naïve Ünïcödé 日本語のテキスト 中文标点。 한국어 🙂👍🏽 שלום",
] * 4


def _split(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


SPLITS: dict[str, Callable[[], pre_tokenizers.PreTokenizer]] = {
    "gpt-2": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": lambda: pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    ),
    "llama-bpe": lambda: _split(f"{_CONTRACTIONS}|\\p{{N}}{{1,3}}{_END}"),
    "dbrx": lambda: _split(f"{_CONTRACTIONS}|\\p{{N}}{{1,3}}{_END}"),
    "qwen2": lambda: _split(f"{_CONTRACTIONS}|\\p{{N}}{_END}"),
}
SENTENCEPIECE = "sentencepiece"


def make_tokenizer(name: str, directory: Path) -> Path:
    """Write a tokenizer of another kind over that of a model directory."""
    control = [AddedToken(token, special=True) for token in CONTROL_TOKENS]
    if name == SENTENCEPIECE:
        backend = _sentencepiece(control)
    else:
        ignores = name == "llama-bpe"
        backend = Tokenizer(models.BPE(ignore_merges=ignores))
        if name == "qwen2":
            backend.normalizer = normalizers.NFC()
        backend.pre_tokenizer = SPLITS[name]()
        backend.decoder = decoders.ByteLevel()
        trainer = BpeTrainer(
            vocab_size=NUM_EMBEDDINGS - 10,
            special_tokens=control,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        backend.train_from_iterator(TEXTS, trainer=trainer)
        backend.add_tokens([AddedToken("<tool>", special=False)])
    PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=CONTROL_TOKENS[1],
        eos_token=CONTROL_TOKENS[2],
        pad_token=CONTROL_TOKENS[2],
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(directory)
    return directory


def _sentencepiece(control: list[AddedToken]) -> Tokenizer:
    """As transformers converts Llama 2's: a token for each byte, a space before each text."""
    space = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    learner = Tokenizer(models.BPE())
    learner.normalizer = space
    trainer = BpeTrainer(vocab_size=100, show_progress=False, initial_alphabet=["▁"])
    learner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    learner.train_from_iterator(TEXTS, trainer=trainer)
    model = json.loads(learner.to_str())["model"]
    names = [
        "<unk>",
        *(one.content for one in control),
        *(f"<0x{byte:02X}>" for byte in range(256)),
    ]
    known = sorted(model["vocab"], key=model["vocab"].__getitem__)
    vocabulary = {name: place for place, name in enumerate([*names, *known])}
    merges = [(one[0], one[1]) for one in model["merges"]]
    backend = Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    backend.normalizer = space
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    backend.add_special_tokens([AddedToken("<unk>", special=True), *control])
    return backend
