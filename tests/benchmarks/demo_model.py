"""Which small model reaches the lowest bits per byte after a number of tokens: how the demo's was chosen.

python tests/benchmarks/demo_model.py DATASET_DIR --layers 4 --width 256 --heads 4 --batch 16 --lr 2e-3

Trains one configuration on a fixed number of tokens (so that a busy machine changes the time, not the
result) and prints one line of JSON. Multiply with the tokens per second of the machine for loss per minute.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from full_stack_transformer.datasets.batches import LengthBatches
from full_stack_transformer.datasets.collators import PaddedCollator
from full_stack_transformer.datasets.corpus import open_dataset
from full_stack_transformer.evaluation.run import measure_corpus
from full_stack_transformer.modelling.losses import next_token_loss
from full_stack_transformer.tasks.causal_lm import CausalLm, CausalLmOptions
from full_stack_transformer.tokenization.document_tokenizer import open_saved_tokenizer
from full_stack_transformer.training.optimization import learning_rate_factor, make_optimizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("dataset", type=Path)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--optimizer", choices=("adamw", "muon"), default="muon")
    parser.add_argument("--weight_decay", type=float, default=0.1)
    parser.add_argument("--tokens", type=float, default=1.6e6)
    parser.add_argument("--warmup", type=int, default=50)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--bf16", action="store_true")
    print(json.dumps(run(parser.parse_args())), flush=True)


def run(options: argparse.Namespace) -> dict[str, object]:
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    dataset = open_dataset(options.dataset)
    tokenizer = open_saved_tokenizer(dataset.tokenizer_directory)
    config = LlamaConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=options.width,
        num_hidden_layers=options.layers,
        num_attention_heads=options.heads,
        intermediate_size=-(-options.width * 8 // 3 // 64) * 64,
        tie_word_embeddings=True,
        max_position_embeddings=dataset.description["max_sample_length"],
    )
    backbone = AutoModelForCausalLM.from_config(config)
    optimizer = make_optimizer(
        backbone,
        name=options.optimizer,
        learning_rate=options.lr,
        weight_decay=options.weight_decay,
    )
    rates = [group["lr"] for group in optimizer.param_groups]
    collate = PaddedCollator(dataset.train, pad_id=tokenizer.pad_id)
    num_tokens, step, epoch = 0, 0, 0
    started = time.perf_counter()
    plan = LengthBatches(dataset.train, batch_size=options.batch, seed=0)
    while num_tokens < options.tokens:
        for position in range(plan.num_batches_per_epoch):
            if num_tokens >= options.tokens:
                break
            batch = collate(plan.batch(epoch, position))
            factor = learning_rate_factor(
                step,
                num_tokens / options.tokens,
                name="cosine",
                num_warmup_steps=options.warmup,
                num_cycles=1,
                decay_fraction=0.0,
                min_ratio=0.05,
            )
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor
            with torch.autocast("cpu", torch.bfloat16, enabled=options.bf16):
                logits = backbone(input_ids=batch["input_ids"], use_cache=False).logits
                loss, count = next_token_loss(logits, batch["labels"])
            torch.autograd.backward(loss / count)
            torch.nn.utils.clip_grad_norm_(backbone.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            num_tokens += int(count)
            step += 1
        epoch += 1
    seconds = time.perf_counter() - started
    backbone.eval()
    task = CausalLm(tokenizer, CausalLmOptions())
    task.read_dataset(dataset)
    metrics = task.evaluation(*measure_corpus(task, backbone, dataset.valid, batch_size=16))
    return {
        **{key: str(value) for key, value in vars(options).items()},
        "parameters": sum(parameter.numel() for parameter in backbone.parameters()),
        "steps": step,
        "tokens_per_second": round(num_tokens / seconds),
        "loss": round(metrics["loss"], 4),
        "bits_per_byte": round(metrics["bits_per_byte"], 4),
    }


if __name__ == "__main__":
    main()
