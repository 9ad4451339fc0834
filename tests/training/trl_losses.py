"""What TRL's own trainers compute of a batch of ours. Needs TRL, which is no dependency."""

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoTokenizer

from full_stack_transformer.datasets.collators import Batch


def trl_loss(
    method: str, model: Any, reference: Any, batch: Batch, tokenizer_dir: Path, directory: Path
) -> float:
    """The loss of a batch, without dropout.

    Args:
        method: of `--task`; "answers" for fine-tuning on conversations.
        model: what is trained.
        reference: the model at the start.
        batch: of pairs the chosen rows first.
        tokenizer_dir: a tokenizer, which is not used for the batch.
        directory: for what the trainer writes.
    """
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    rows = Dataset.from_list([{"prompt": "a", "chosen": " b", "rejected": " c"}] * 2)
    options: dict[str, Any] = {"output_dir": str(directory), "use_cpu": True, "bf16": False}
    options |= {"report_to": [], "beta": 0.1}
    ids, labels = batch["input_ids"], batch["labels"]
    if method == "answers":
        from trl import SFTConfig, SFTTrainer

        del options["beta"]
        tuner: Any = SFTTrainer(
            model,
            args=SFTConfig(**options),
            train_dataset=Dataset.from_list([{"text": "a b"}] * 2),
            processing_class=tokenizer,
        )
        inputs = {"input_ids": ids, "attention_mask": _is_token(batch), "labels": labels}
        return float(tuner.compute_loss(tuner.model.eval(), inputs).detach())
    if method == "dpo":
        from trl import DPOConfig, DPOTrainer

        trainer: Any = DPOTrainer(
            model,
            reference,
            args=DPOConfig(**options),
            train_dataset=rows,
            processing_class=tokenizer,
        )
        inputs = {
            "input_ids": ids,
            "attention_mask": _is_token(batch),
            "completion_mask": (labels != -100).long(),
        }
        return float(trainer.compute_loss(trainer.model.eval(), inputs).detach())
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    trainer = ORPOTrainer(
        model, args=ORPOConfig(**options), train_dataset=rows, processing_class=tokenizer
    )
    half = len(ids) // 2
    inputs = {
        f"{name}_{key}": value[part]
        for name, part in (("chosen", slice(half)), ("rejected", slice(half, None)))
        for key, value in (
            ("input_ids", ids),
            ("attention_mask", _is_token(batch)),
            ("labels", labels),
        )
    }
    return float(trainer.get_batch_loss_metrics(trainer.model.eval(), inputs)[0].detach())


def _is_token(batch: Batch) -> torch.Tensor:
    """The attention mask: a sample ends with its answer."""
    positions = torch.arange(batch["labels"].shape[1])
    ends = ((batch["labels"] != -100) * positions).max(dim=1, keepdim=True).values
    return (positions <= ends).long()
