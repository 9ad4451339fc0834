"""A model directory made in a second: two layers, width 64, random weights, context of 128 tokens.

For loops outside of pytest; tests use the fixture `model_dir`.
"""

from pathlib import Path

import torch

from full_stack_transformer.arguments.data import PrepareDatasetArguments
from full_stack_transformer.datasets.corpus import open_dataset
from full_stack_transformer.modelling.backbones import new_backbone
from full_stack_transformer.modelling.model_directory import save_model_directory
from full_stack_transformer.preparation.prepare import main as prepare_dataset
from tests.conftest import write_documents


def make_tiny_model(root: Path) -> Path:
    """Write a dataset and a model below `root`, and return the model directory."""
    for name, num_documents in (("train", 100), ("valid", 10)):
        write_documents(root / f"{name}.txt", num_documents=num_documents)
    dataset = open_dataset(
        prepare_dataset(
            PrepareDatasetArguments(
                documents_train_file=(root / "train.txt",),
                documents_valid_file=(root / "valid.txt",),
                datasets_root=root / "datasets",
                dataset_name="tiny",
                vocab_size=300,
                max_sample_length=64,
            )
        )
    )
    torch.manual_seed(0)
    backbone = new_backbone(
        "tiny",
        vocab_size=dataset.description["vocab_size"],
        max_length=128,
        special_token_ids=dataset.description["special_token_ids"],
    )
    # Fresh weights predict all tokens about alike; sharper ones make generated texts differ.
    with torch.no_grad():
        backbone.get_input_embeddings().weight.mul_(6)
    save_model_directory(
        root / "tiny-model",
        backbone,
        tokenizer_directory=dataset.tokenizer_directory,
        description={"step": 0, "validation_loss": 5.5},
    )
    return root / "tiny-model"
