"""A model as others publish them, in small: chat template, control tokens, bfloat16, settings of its own."""

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from tokenizers.trainers import BpeTrainer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CONTROL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
# transformers reads it, and refuses to save it: without sampling there is no temperature.
GENERATION_CONFIG = {
    "bos_token_id": 1,
    "do_sample": False,
    "eos_token_id": [2, 0],
    "pad_token_id": 2,
    "temperature": 0.2,
    "transformers_version": "4.42.3",
}
# More embeddings than tokens, as in Qwen.
NUM_EMBEDDINGS = 384
_NUM_TOKENS = 320


def make_chat_model(directory: Path, text: str, **config: Any) -> Path:
    """Write a model directory; its tokenizer is trained on `text`, and adds nothing to texts."""
    make_chat_tokenizer(directory, text)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            **{
                "vocab_size": NUM_EMBEDDINGS,
                "hidden_size": 64,
                "intermediate_size": 96,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "max_position_embeddings": 512,
                "bos_token_id": 1,
                "eos_token_id": 2,
                "pad_token_id": 2,
                "tie_word_embeddings": True,
                **config,
            }
        )
    )
    model.to(torch.bfloat16).save_pretrained(directory)
    (directory / "generation_config.json").write_text(json.dumps(GENERATION_CONFIG, indent=1))
    return directory


def make_chat_tokenizer(directory: Path, text: str) -> None:
    """Write the tokenizer alone, with two chat templates."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=_NUM_TOKENS,
        special_tokens=[AddedToken(token, special=True) for token in CONTROL_TOKENS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(text.splitlines(), trainer=trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
        model_max_length=8192,
        chat_template={"default": CHAT_TEMPLATE, "tool_use": CHAT_TEMPLATE + "tools"},
    )
    tokenizer.save_pretrained(directory)
