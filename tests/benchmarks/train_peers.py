"""One way of training, in a process of its own that takes a block of steps when it is told to.

    python train_peers.py '{"subject": "ours", "shape": "small", …}'

Reads the number of steps of each block from standard input, a line a block, and answers each with a line
of JSON: seconds, steps and tokens that were no padding. The first answer comes when the subject is ready.
All subjects train GPT-2's architecture on the same random token ids with AdamW.
"""

import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

SHAPES = {
    # layers, width, heads, vocabulary, rows, tokens
    "tiny": (2, 64, 2, 512, 4, 64),
    "small": (6, 384, 6, 8192, 16, 256),
    "short": (6, 384, 6, 8192, 4, 256),
    "big": (12, 768, 12, 50257, 4, 256),
}
NUM_THREADS = 2


def main() -> None:
    """Set up the subject, then run blocks until the input ends."""
    job = json.loads(sys.argv[1])
    torch.set_num_threads(NUM_THREADS)
    torch.manual_seed(0)
    subjects: dict[str, Callable[[dict[str, Any]], None]] = {
        "ours": _ours,
        "ours without Lightning": _bare,
        "trainer": _hugging_face_trainer,
        "nanogpt": _nanogpt,
        "nanogpt compiled": _nanogpt,
        "litgpt": _nanogpt,
        "raw": _nanogpt,
    }
    subjects[job["subject"]](job)


class Blocks:
    """The conversation with the parent: when a block begins, and what came out."""

    def __init__(self) -> None:
        self._left = 0
        self._num_steps = 0
        self.num_tokens = self.num_slots = 0
        self._started = 0.0

    def before_step(self) -> bool:
        """Wait for the next block if the last one is over; false when there is none."""
        if self._left == 0:
            now = time.perf_counter()
            seconds = now - self._started
            report = {
                "seconds": seconds,
                "steps": self._num_steps,
                "tokens": self.num_tokens,
                "slots": self.num_slots,
            }
            sys.stdout.write(json.dumps(report) + "\n")
            sys.stdout.flush()
            line = sys.stdin.readline()
            if not line:
                return False
            self._left = self._num_steps = int(line)
            self.num_tokens = self.num_slots = 0
            self._started = time.perf_counter()
        self._left -= 1
        return True

    def count(self, labels: Tensor) -> None:
        """Count the targets of a batch (rows, tokens), and its slots."""
        self.num_tokens += int((labels[:, 1:] != -100).sum())
        self.num_slots += labels.numel()


def documents(job: dict[str, Any]) -> Iterator[np.ndarray[Any, np.dtype[np.int64]]]:
    """Documents of random ids: all as long as a row, or short ones with a mean of 40 tokens."""
    vocabulary, row_length = SHAPES[job["shape"]][3], SHAPES[job["shape"]][5]
    numbers = np.random.default_rng(0)
    for _ in range(job["num_documents"]):
        length = row_length
        if job["is_short"]:
            length = int(np.clip(numbers.lognormal(3.4, 0.75), 8, row_length))
        yield numbers.integers(3, vocabulary, length)


# ---------------------------------------------------------------- ours


def _trainer_of(job: dict[str, Any], directory: str) -> Any:
    """The parts that `fst train` puts together, for the documents of the job."""
    from pathlib import Path

    from full_stack_transformer.arguments.training import TrainArguments
    from full_stack_transformer.datasets.corpus import CorpusWriter

    layers, width, heads, vocabulary, rows, tokens = SHAPES[job["shape"]]
    config = {
        "model_type": "gpt2",
        "n_layer": layers,
        "n_embd": width,
        "n_head": heads,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "n_positions": tokens,
    }
    root = Path(directory)
    (root / "config.json").write_text(json.dumps(config))
    counts = {}
    for split in ("train", "valid"):
        with CorpusWriter(root / "data" / split, vocabulary) as corpus:
            for document in documents(job):
                corpus.append(document, np.array([len(document)]))
        counts[f"number_of_{split}_samples"] = corpus.num_samples
        counts[f"number_of_{split}_tokens"] = corpus.num_tokens
    arguments = TrainArguments(
        precision=job["precision"],
        dataset_dir=root / "data",
        model_config=str(root / "config.json"),
        batch_size=rows,
        batching="packed" if job["is_short"] else "length",
        max_epochs=-1,
        max_steps=10**6,
        learning_rate=1e-4,
        compile="always" if job["compile"] else "never",
    )
    return arguments, counts, vocabulary, tokens


def _data_and_task(job: dict[str, Any], directory: str) -> Any:
    from full_stack_transformer.datasets.corpus import Corpus, DatasetDirectory
    from full_stack_transformer.modelling.acceleration import compile_layers
    from full_stack_transformer.modelling.backbones import new_backbone
    from full_stack_transformer.training.module import TrainingModule
    from tests.training.small_training import causal_data

    arguments, counts, vocabulary, tokens = _trainer_of(job, directory)
    corpora = [
        Corpus(
            arguments.dataset_dir / split,
            num_samples=counts[f"number_of_{split}_samples"],
            num_tokens=counts[f"number_of_{split}_tokens"],
        )
        for split in ("train", "valid")
    ]
    ids = {"begin": 0, "end": 1, "pad": 2}
    description = {
        **counts,
        "vocab_size": vocabulary,
        "max_sample_length": tokens,
        "special_token_ids": ids,
    }
    dataset = DatasetDirectory(arguments.dataset_dir, description, corpora[0], corpora[1])
    data = causal_data(dataset, arguments)
    backbone = new_backbone(
        arguments.model_config, vocab_size=vocabulary, max_length=tokens, special_token_ids=ids
    )
    task = TrainingModule(backbone, arguments, data.task)
    if arguments.compile == "always":
        compile_layers(backbone)
    return data, task


def _ours(job: dict[str, Any]) -> None:
    """The real task, loader and Lightning loop, with the callback that logs and counts."""
    import tempfile

    import pytorch_lightning as pl

    from full_stack_transformer.training.lightning_trainer import quieten_libraries

    quieten_libraries()

    class Block(pl.Callback):
        def __init__(self) -> None:
            self.blocks = Blocks()

        def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
            if not self.blocks.before_step():
                sys.exit(0)

        def on_train_batch_end(
            self, trainer: pl.Trainer, module: Any, outputs: Any, batch: dict[str, Tensor], _: int
        ) -> None:
            self.blocks.count(batch["labels"])

    with tempfile.TemporaryDirectory() as directory:
        data, task = _data_and_task(job, directory)
        trainer = bare_trainer(job["precision"], Block())
        trainer.fit(task, datamodule=data)


def bare_trainer(precision: str, block: Any) -> Any:
    """Lightning with nothing beside the steps but what measures them; `precision` is bf16 or fp32."""
    import pytorch_lightning as pl

    from full_stack_transformer.training.callbacks.control import NEVER

    return pl.Trainer(
        accelerator="cpu",
        precision="bf16-mixed" if precision == "bf16" else "32-true",
        max_epochs=1,
        logger=False,
        check_val_every_n_epoch=None,
        val_check_interval=NEVER,
        gradient_clip_val=1.0,
        enable_checkpointing=False,
        callbacks=[block],
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
    )


def _bare(job: dict[str, Any]) -> None:
    """The same task and loader, in a loop without Lightning: what is left is what Lightning costs."""
    import tempfile
    from types import SimpleNamespace

    with tempfile.TemporaryDirectory() as directory:
        data, task = _data_and_task(job, directory)
        blocks = Blocks()
        from full_stack_transformer.training.optimization import make_optimizer

        optimizer = make_optimizer(task, name="adamw", learning_rate=1e-4, weight_decay=0.1)
        data.trainer = SimpleNamespace(global_rank=0, world_size=1)
        for batch in data.train_dataloader():
            if not blocks.before_step():
                return
            is_bf16 = job["precision"] == "bf16"
            with torch.autocast("cpu", torch.bfloat16, enabled=is_bf16, cache_enabled=False):
                loss, _ = task.mean_losses(batch)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(task.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            blocks.count(batch["labels"])


# ---------------------------------------------------------------- peers


def _padded_batches(job: dict[str, Any]) -> Iterator[tuple[Tensor, Tensor]]:
    """Random batches, padded to their longest document: ids and labels (rows, tokens)."""
    rows = SHAPES[job["shape"]][4]
    texts = list(documents(job))
    numbers = np.random.default_rng(1)
    while True:
        order = numbers.permutation(len(texts))
        for first in range(0, len(order) - rows + 1, rows):
            batch = [texts[number] for number in order[first : first + rows]]
            longest = max(map(len, batch))
            ids = torch.full((rows, longest), 2)
            labels = torch.full((rows, longest), -100)
            for row, text in enumerate(batch):
                ids[row, : len(text)] = labels[row, : len(text)] = torch.from_numpy(text)
            yield ids, labels


def _hugging_face_trainer(job: dict[str, Any]) -> None:
    """The Trainer as it comes: fp32, dropout of 0.1, batches padded at random."""
    import os
    import tempfile

    from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback
    from transformers import TrainingArguments as HubArguments

    os.environ["HF_HUB_OFFLINE"] = "1"
    layers, width, heads, vocabulary, rows, tokens = SHAPES[job["shape"]]
    config = GPT2Config(
        vocab_size=vocabulary, n_positions=tokens, n_embd=width, n_layer=layers, n_head=heads
    )
    texts = [{"input_ids": text.tolist()} for text in documents(job)]
    blocks = Blocks()

    def collate(samples: list[dict[str, list[int]]]) -> dict[str, Tensor]:
        longest = max(len(sample["input_ids"]) for sample in samples)
        ids = torch.full((len(samples), longest), 2)
        mask = torch.zeros_like(ids)
        labels = torch.full_like(ids, -100)
        for row, sample in enumerate(samples):
            text = torch.tensor(sample["input_ids"])
            ids[row, : len(text)] = labels[row, : len(text)] = text
            mask[row, : len(text)] = 1
        blocks.count(labels)
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    class Block(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            if not blocks.before_step():
                os._exit(0)

    with tempfile.TemporaryDirectory() as directory:
        options = HubArguments(
            output_dir=directory,
            per_device_train_batch_size=rows,
            num_train_epochs=10**4,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            save_strategy="no",
            logging_strategy="no",
        )
        trainer = Trainer(
            model=GPT2LMHeadModel(config),
            args=options,
            train_dataset=texts,
            data_collator=collate,
            callbacks=[Block()],
        )
        trainer.train()


class _Block(nn.Module):
    """GPT-2's layer as small training repositories write it."""

    def __init__(self, width: int, heads: int, *, bias: bool) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList([nn.LayerNorm(width, bias=bias) for _ in range(2)])
        self.attention_in = nn.Linear(width, 3 * width, bias=bias)
        self.attention_out = nn.Linear(width, width, bias=bias)
        self.mlp_in = nn.Linear(width, 4 * width, bias=bias)
        self.mlp_out = nn.Linear(4 * width, width, bias=bias)

    def forward(self, hidden: Tensor) -> Tensor:
        rows, tokens, width = hidden.shape
        parts = self.attention_in(self.norms[0](hidden)).split(width, dim=2)
        query, key, value = (
            part.view(rows, tokens, self.heads, -1).transpose(1, 2) for part in parts
        )
        attended = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        hidden = hidden + self.attention_out(attended.transpose(1, 2).reshape(rows, tokens, width))
        inner = functional.gelu(self.mlp_in(self.norms[1](hidden)))
        output: Tensor = hidden + self.mlp_out(inner)
        return output


class _Model(nn.Module):
    """GPT-2 with a head tied to the embeddings."""

    def __init__(self, shape: str, *, bias: bool) -> None:
        super().__init__()
        layers, width, heads, vocabulary, _, tokens = SHAPES[shape]
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(tokens, width)
        self.blocks = nn.ModuleList([_Block(width, heads, bias=bias) for _ in range(layers)])
        self.norm = nn.LayerNorm(width, bias=bias)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.tokens.weight
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        hidden = self.tokens(ids) + self.positions.weight[: ids.shape[1]]
        for block in self.blocks:
            hidden = block(hidden)
        logits = self.head(self.norm(hidden))
        loss: Tensor = functional.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), ignore_index=-100
        )
        return loss


def _nanogpt(job: dict[str, Any]) -> None:
    """nanoGPT's loop (no biases, fused AdamW), litgpt's (biases, AdamW as it comes), or that in fp32."""
    name = job["subject"]
    model = _Model(job["shape"], bias=not name.startswith("nanogpt"))
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=1e-4,
        betas=(0.9, 0.95),
        weight_decay=0.1,
        fused=name.startswith("nanogpt") or None,
    )
    forward: Callable[[Tensor, Tensor], Tensor] = model
    if name.endswith("compiled"):
        forward = torch.compile(model)
    blocks = Blocks()
    for ids, labels in _padded_batches(job):
        if not blocks.before_step():
            return
        is_bf16 = job["precision"] == "bf16" and name != "raw"
        with torch.autocast("cpu", torch.bfloat16, enabled=is_bf16):
            loss = forward(ids[:, :-1].contiguous(), labels[:, 1:].contiguous())
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        assert math.isfinite(loss.item())
        blocks.count(labels)


if __name__ == "__main__":
    main()
