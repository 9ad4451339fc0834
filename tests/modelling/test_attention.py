"""Written-out attention computes what torch's kernel does, and documents in a row stay apart."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PretrainedConfig
from transformers import PreTrainedModel as Backbone

from full_stack_transformer.modelling.attention import (
    ATTENTION_NAME,
    attend,
    use_written_out_attention,
)
from full_stack_transformer.modelling.losses import next_token_loss

VOCAB_SIZE = 61
LENGTHS_OF_ROWS = ([5, 1, 9, 17], [32], [3, 29])

_SHAPES: dict[str, PretrainedConfig] = {
    "llama with shared keys": LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=None,
        bos_token_id=0,
        eos_token_id=1,
    ),
    "gpt2": GPT2Config(
        vocab_size=VOCAB_SIZE,
        n_embd=32,
        n_layer=2,
        n_head=2,
        n_positions=64,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=1,
    ),
}

Inputs = tuple[Tensor, Tensor, Tensor]

each_shape = pytest.mark.parametrize("config", _SHAPES.values(), ids=_SHAPES.keys())


def _backbone(config: PretrainedConfig) -> Backbone:
    torch.manual_seed(0)
    backbone = AutoModelForCausalLM.from_config(config).train()
    with torch.no_grad():  # sharper than fresh weights, so that attention matters
        for parameter in backbone.parameters():
            if parameter.ndim == 2:
                parameter.mul_(8)
    return backbone


def _inputs(num_tokens: int, num_key_heads: int, dtype: torch.dtype) -> Inputs:
    """Queries, keys and values."""
    torch.manual_seed(num_tokens)

    def draw(num_heads: int) -> Tensor:
        return torch.randn(2, num_heads, num_tokens, 16).to(dtype).requires_grad_()

    return draw(4), draw(num_key_heads), draw(num_key_heads)


def _mask_of_documents(num_tokens: int) -> Tensor:
    documents = torch.arange(num_tokens) // torch.tensor([[7], [23]])
    return (documents[:, None, :, None] == documents[:, None, None, :]).tril()


def _reference(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float
) -> Tensor:
    attended = functional.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        is_causal=mask is None,
        scale=scaling,
        enable_gqa=True,
    )
    return attended.transpose(1, 2)


def _with_gradients(attended: Tensor, inputs: Inputs) -> list[Tensor]:
    torch.manual_seed(1)
    gradients = torch.autograd.grad(attended, inputs, torch.randn(attended.shape).to(attended))
    return [attended.detach(), *gradients]


def _error(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected.float()).norm() / expected.float().norm())


@pytest.mark.parametrize("num_key_heads", [4, 2], ids=["own keys", "shared keys"])
@pytest.mark.parametrize("has_mask", [False, True], ids=["causal", "documents"])
@pytest.mark.parametrize("num_tokens", [1, 31, 256, 515])
def test_written_out_attention_is_as_exact_as_that_of_torch(
    num_tokens: int, has_mask: bool, num_key_heads: int
) -> None:
    mask = _mask_of_documents(num_tokens) if has_mask else None
    exact_inputs = _inputs(num_tokens, num_key_heads, torch.float32)
    exact = _with_gradients(_reference(*exact_inputs, mask, 0.2), exact_inputs)
    inputs = _inputs(num_tokens, num_key_heads, torch.bfloat16)
    of_torch = _with_gradients(_reference(*inputs, mask, 0.2), inputs)
    attended, _ = attend(nn.Module(), *inputs, mask, scaling=0.2)
    assert attended.dtype == torch.bfloat16
    for found, peer, expected in zip(
        _with_gradients(attended, inputs), of_torch, exact, strict=True
    ):
        if expected.norm() > 1e-4:  # of a single token the gradient of the query is zero
            assert _error(found, expected) < 1.5 * _error(peer, expected) + 1e-4


@torch.no_grad()
def test_rotated_queries_in_fp32_meet_values_in_bf16() -> None:
    query, key, value = _inputs(40, 2, torch.float32)
    attended, _ = attend(nn.Module(), query, key, value.bfloat16(), None)
    assert attended.dtype == torch.bfloat16
    assert _error(attended, _reference(query, key, value, None, 0.25)) < 0.01


@torch.no_grad()
def test_dropout_leaves_out_probabilities_and_keeps_the_mean() -> None:
    query, key, _ = _inputs(31, 4, torch.bfloat16)
    torch.manual_seed(0)
    ones = torch.ones(2, 4, 31, 16, dtype=torch.bfloat16)
    attended, _ = attend(nn.Module(), query, key, ones, None, dropout=0.5)
    assert attended.float().std() > 0.1
    assert attended.float().mean().item() == pytest.approx(1, abs=0.1)


def _packed() -> dict[str, Tensor]:
    torch.manual_seed(2)
    input_ids = torch.randint(0, VOCAB_SIZE, (len(LENGTHS_OF_ROWS), sum(LENGTHS_OF_ROWS[0])))
    positions = [
        torch.cat([torch.arange(length) for length in lengths]) for lengths in LENGTHS_OF_ROWS
    ]
    position_ids = torch.stack(positions)
    labels = input_ids.masked_fill(position_ids == 0, -100)
    return {"input_ids": input_ids, "position_ids": position_ids, "labels": labels}


def _packed_loss(backbone: Backbone, batch: dict[str, Tensor]) -> Tensor:
    output = backbone(
        input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False
    )
    return next_token_loss(output.logits, batch["labels"])[0]


def _loss_of_documents_alone(backbone: Backbone, batch: dict[str, Tensor]) -> Tensor:
    losses = []
    for row, lengths in zip(batch["input_ids"], LENGTHS_OF_ROWS, strict=True):
        for document in row.split(lengths):
            logits = backbone(input_ids=document[None], use_cache=False).logits
            losses.append(next_token_loss(logits, document[None])[0])
    return torch.stack(losses).sum()


@each_shape
@pytest.mark.parametrize("is_written_out", [True, False], ids=["written out", "sdpa"])
def test_a_packed_batch_has_the_loss_and_gradient_of_its_documents_alone(
    config: PretrainedConfig, is_written_out: bool
) -> None:
    backbone = _backbone(config)
    if is_written_out:
        assert use_written_out_attention(backbone)
    batch = _packed()
    losses, norms = [], []
    for loss_of in (_packed_loss, _loss_of_documents_alone):
        backbone.zero_grad()
        loss = loss_of(backbone, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        losses.append(loss.item())
        norms.append(torch.nn.utils.get_total_norm([p.grad for p in backbone.parameters()]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert norms[0].item() == pytest.approx(norms[1].item(), rel=1e-5)


@each_shape
def test_a_document_does_not_notice_what_stands_before_it_in_its_row(
    config: PretrainedConfig,
) -> None:
    backbone = _backbone(config)
    use_written_out_attention(backbone)
    batch = _packed()
    other_ids = batch["input_ids"].clone()
    other_ids[0, :5] = (other_ids[0, :5] + 1) % VOCAB_SIZE
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits, others = (
            backbone(
                input_ids=input_ids, position_ids=batch["position_ids"], use_cache=False
            ).logits
            for input_ids in (batch["input_ids"], other_ids)
        )
    assert torch.equal(logits[0, 5:], others[0, 5:])
    assert not torch.equal(logits[0, :5], others[0, :5])


@each_shape
def test_a_saved_backbone_does_not_know_the_name(config: PretrainedConfig, tmp_path: Path) -> None:
    backbone = _backbone(config).eval()
    input_ids = _packed()["input_ids"]
    expected = backbone(input_ids=input_ids).logits
    use_written_out_attention(backbone)
    assert backbone.config._attn_implementation == ATTENTION_NAME
    backbone.save_pretrained(tmp_path)
    assert ATTENTION_NAME not in (tmp_path / "config.json").read_text()
    saved = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert saved.config._attn_implementation == "sdpa"
    assert torch.equal(saved(input_ids=input_ids).logits, expected)
    assert torch.equal(backbone(input_ids=input_ids).logits, expected)


@each_shape
def test_generating_with_a_cache_and_padding_on_the_left_gives_the_same_tokens(
    config: PretrainedConfig,
) -> None:
    input_ids = _packed()["input_ids"][:2, :7]
    attention_mask = torch.ones_like(input_ids)
    attention_mask[0, :3] = 0
    texts = []
    for is_written_out in (False, True):
        backbone = _backbone(config).eval()
        if is_written_out:
            use_written_out_attention(backbone)
        texts.append(
            backbone.generate(
                input_ids,
                attention_mask=attention_mask,
                max_new_tokens=12,
                do_sample=False,
                pad_token_id=0,
            )
        )
    assert torch.equal(*texts)


def test_a_backbone_that_does_not_use_torchs_attention_is_left_alone() -> None:
    backbone = AutoModelForCausalLM.from_config(_SHAPES["gpt2"], attn_implementation="eager")
    assert not use_written_out_attention(backbone)
    assert backbone.config._attn_implementation == "eager"
