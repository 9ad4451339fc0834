"""One way of fine-tuning, in a process of its own that takes a block of steps when it is told to.

    python fine_tuning_peers.py '{"subject": "ours", "method": "full", "model": …, "dataset": …}'

Speaks with its parent as train_peers.py does. All subjects take the same batches in the same order.
"""

import json
import os
import resource
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.benchmarks.train_peers import NUM_THREADS, Blocks, bare_trainer

LORA_RANK = 16


def main() -> None:
    """Set up the subject, then run blocks until the input ends."""
    job = json.loads(sys.argv[1])
    torch.set_num_threads(NUM_THREADS)
    torch.manual_seed(0)
    _ours(job) if job["subject"] == "ours" else _trl(job)


class _Blocks(Blocks):
    """Counts the tokens that are no padding, and the peak of the memory."""

    def count_tokens(self, batch: dict[str, Tensor]) -> None:
        self.num_tokens += int(batch["num_tokens"])
        self.num_slots = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def _setup(job: dict[str, Any]) -> Any:
    from full_stack_transformer.arguments.training import TrainArguments
    from full_stack_transformer.training.setup import open_setup

    arguments = TrainArguments(
        dataset_dir=Path(job["dataset"]),
        model_path=job["model"],
        batch_size=job["rows"],
        precision=job["precision"],
        activation_checkpointing=job["checkpointing"],
        lora_rank=LORA_RANK if job["method"] == "lora" else 0,
        max_epochs=1000,
        compile="never",
    )
    setup = open_setup(arguments)
    setup.begin(None)
    return setup


def _ours(job: dict[str, Any]) -> None:
    """The real step, loader and Lightning loop of fst train."""
    import pytorch_lightning as pl

    from full_stack_transformer.training.lightning_trainer import quieten_libraries

    quieten_libraries()

    class Block(pl.Callback):
        def __init__(self) -> None:
            self.blocks = _Blocks()

        def on_train_batch_start(self, *_: Any) -> None:
            if not self.blocks.before_step():
                os._exit(0)

        def on_train_batch_end(
            self, trainer: pl.Trainer, module: Any, outputs: Any, batch: dict[str, Tensor], _: int
        ) -> None:
            self.blocks.count_tokens(batch)

    setup = _setup(job)
    module = setup.make_module(setup.make_backbone(), setup.arguments)
    trainer = bare_trainer(job["precision"], Block())
    trainer.fit(module, datamodule=setup.data)


def _trl(job: dict[str, Any]) -> None:
    """TRL's SFTTrainer with our batches; what it measures besides the loss belongs to it."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    os.environ["HF_HUB_OFFLINE"] = "1"
    blocks, batches = _Blocks(), _batches(job)

    class Block(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            if not blocks.before_step():
                os._exit(0)

    def collate(_: Any) -> dict[str, Tensor]:
        batch = next(batches)
        blocks.count_tokens(batch)
        del batch["num_tokens"]
        return batch

    options = SFTConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=job["rows"],
        num_train_epochs=1000,
        use_cpu=True,
        bf16=job["precision"] == "bf16",
        gradient_checkpointing=job["checkpointing"],
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
        logging_strategy="no",
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    trainer = SFTTrainer(
        AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32),
        args=options,
        train_dataset=Dataset.from_list([{"input_ids": [5, 6]}] * 4096),
        data_collator=collate,
        processing_class=AutoTokenizer.from_pretrained(job["model"]),
        callbacks=[Block()],
        peft_config=LoraConfig(r=LORA_RANK, lora_alpha=2 * LORA_RANK, target_modules="all-linear")
        if job["method"] == "lora"
        else None,
    )
    trainer.train()


def _batches(job: dict[str, Any]) -> Iterator[dict[str, Tensor]]:
    """Ours, with the mask that TRL wants."""
    data = _setup({**job, "method": "full"}).data
    for batch in data.train_dataloader():
        lengths = (batch["input_ids"] != job["pad_id"]).sum(dim=1, keepdim=True)
        mask = (torch.arange(batch["input_ids"].shape[1]) < lengths).long()
        assert int(mask.sum()) == int(batch["num_tokens"]), "no token of a conversation is padding"
        yield {
            **{name: batch[name] for name in ("input_ids", "labels", "num_tokens")},
            "attention_mask": mask,
        }


if __name__ == "__main__":
    main()
