"""How well a masked language model guesses hidden tokens of the validation samples."""

import logging
import math
from collections import Counter
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from full_stack_transformer.arguments.models import EvaluateArguments
from full_stack_transformer.datasets.batches import SortedBatches
from full_stack_transformer.datasets.collators import IGNORED_LABEL
from full_stack_transformer.datasets.description import DatasetDirectory, open_dataset
from full_stack_transformer.datasets.masking import (
    MaskedCollator,
    MaskedSamples,
    Masking,
    make_masking,
)
from full_stack_transformer.errors import DatasetError
from full_stack_transformer.tasks.catalogue import OpenedTask, open_task
from full_stack_transformer.tokenization.document_tokenizer import open_saved_tokenizer

logger = logging.getLogger(__name__)


@torch.inference_mode()
def evaluate_masked(arguments: EvaluateArguments) -> dict[str, Any]:
    """The figures of a masked language model: those that training found at its validations.

    Raises:
        DatasetError: the dataset was made with another tokenizer than the model's.
    """
    opened = open_task(arguments.model, device=arguments.device)
    dataset = open_dataset(arguments.data)
    masking = _masking(opened, dataset)
    device = next(opened.backbone.parameters()).device
    samples = MaskedSamples(dataset.valid, masking)
    plan = SortedBatches(samples, batch_size=arguments.batch_size)
    pad_id = dataset.description["special_token_ids"]["pad"]
    collate = MaskedCollator(dataset.valid, masking, pad_id=pad_id)
    loss_sum, num_right, hidden = 0.0, 0, Counter[int]()
    for position in range(plan.num_batches_per_epoch):
        batch = {key: value.to(device) for key, value in collate(plan.batch(0, position)).items()}
        is_hidden = batch["labels"] != IGNORED_LABEL
        labels = batch.pop("labels")[is_hidden]
        logits = opened.backbone(**batch).logits[is_hidden].float()
        loss_sum += float(cross_entropy(logits, labels, reduction="sum"))
        num_right += int((logits.argmax(-1) == labels).sum())
        hidden.update(labels.tolist())
    num_hidden = max(1, hidden.total())
    loss = loss_sum / num_hidden
    content: dict[str, Any] = {
        "task": opened.name,
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),
        "accuracy": num_right / num_hidden,
        "num_samples": len(dataset.valid),
        "num_hidden_tokens": num_hidden,
        "baselines": {"majority": {"accuracy": hidden.most_common(1)[0][1] / num_hidden}},
    }
    logger.info(
        "guessed %s hidden tokens: accuracy %.4f (majority %.4f), loss %.4f, perplexity %.2f",
        f"{num_hidden:,}",
        content["accuracy"],
        content["baselines"]["majority"]["accuracy"],
        loss,
        content["perplexity"],
    )
    return content


def _masking(opened: OpenedTask, dataset: DatasetDirectory) -> Masking:
    """As training hid them at its validations."""
    theirs = open_saved_tokenizer(dataset.tokenizer_directory)
    ours = opened.task.tokenizer
    known = ours.get_vocab()
    if any(known.get(token) != number for token, number in theirs.backend.get_vocab().items()):
        raise DatasetError(
            f"{dataset.directory} was prepared with another tokenizer than the model's; prepare the "
            "documents with the one that it was trained with"
        )
    options = opened.description.get("masking", {})
    return make_masking(
        theirs,
        mask_id=ours.mask_token_id,
        vocab_size=len(ours),
        probability=options.get("probability", Masking.probability),
        whole_words=options.get("whole_words", False),
    )
