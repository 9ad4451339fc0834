"""A tiny model of each task that a service can serve beside generating."""

from pathlib import Path

from full_stack_transformer.tokenization.document_tokenizer import load_tokenizer
from full_stack_transformer.tokenization.transformers_tokenizer import save_tokenizer
from tests.tasks.small_tasks import save_task, small_rows, small_task, small_tokenizer

TASKS = (
    "sequence_classification",
    "token_labelling",
    "span_selection",
    "multiple_choice",
    "sentence_embedding",
    "masked_lm",
)


def make_task_models(root: Path) -> list[str]:
    """A model directory for each task below `root`; the options of `fst serve` that name them."""
    plain_dir, masking_dir = small_tokenizer(root / "plain"), root / "masking"
    save_tokenizer(load_tokenizer(None, str(plain_dir)), masking_dir, max_length=48, can_mask=True)
    options: list[str] = []
    for name in TASKS:
        rows = [] if name == "masked_lm" else small_rows(name, 12)
        tokenizer_dir = masking_dir if name == "masked_lm" else plain_dir
        task, backbone = small_task(name, rows, tokenizer_dir)
        description = {"step": 3, "validation_loss": 0.5}
        save_task(root / name, task, backbone, tokenizer_dir, description)
        options += ["--more_models", f"{name}={root / name}"]
    return options
