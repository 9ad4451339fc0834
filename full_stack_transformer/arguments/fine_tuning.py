"""Options of `fst train` that only matter where it starts from a pretrained model."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from full_stack_transformer.arguments.checks import at_least, between
from full_stack_transformer.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class AdapterOptions:
    """Adapters (LoRA)."""

    lora_rank: int = 0
    """Rank of low-rank matrices that are added to those of --model_path and trained in their place. The
    model itself stays as it is; a small adapter directory is written. 0 trains all weights."""
    lora_alpha: float | None = None
    """Scale of the addition: lora_alpha / lora_rank with lora and dora, lora_alpha / sqrt(lora_rank) with
    rslora. Default: twice the rank, with rslora twice its root."""
    lora_dropout: float = 0.0
    """Dropout probability of the inputs of the low-rank matrices."""
    lora_kind: Literal["lora", "dora", "rslora"] = "lora"
    """dora: also trains the length of each row of a matrix; slower. rslora: scaled for high ranks."""
    lora_targets: str = "all"
    """Layers that get an adapter: all for every linear layer but the output, or names with commas, such as
    q_proj,v_proj."""
    lora_embeddings: bool = False
    """Adapters for the embeddings and the output layer too."""


@dataclass(frozen=True, kw_only=True)
class FineTuningOptions:
    """Fine-tuning."""

    train_on: Literal["answers", "all"] = "answers"
    """Conversations: which tokens are learned. all: also those of the system, the user and the template."""
    preference_beta: float = 0.1
    """Preferences: how much they count. High values keep close to the start in direct preference
    optimization; with odds ratios it is their weight beside the likelihood of the chosen answer."""
    reference: Literal["start", "none"] = "start"
    """Direct preference optimization: what answers are compared with. start: the model at the start, which
    takes its memory and its forward pass too; with --lora_rank only the pass."""
    teacher: str | None = None
    """Model directory of a larger model with the same tokenizer, whose predictions are learned too
    (Hinton et al. 2015)."""
    teacher_weight: float = 0.5
    """Part of the loss that is the divergence from --teacher; the rest is the cross entropy."""
    teacher_temperature: float = 1.0
    """Divides the logits of both models before they are compared."""
    replay: tuple[str, ...] = ()
    """DATASET:SHARE, such as data/datasets/general:0.1: documents that are learned beside --dataset_dir, so
    that the model does not forget them, and which part of the learned tokens they are; may be repeated."""
    neftune_alpha: float = 0.0
    """Uniform noise on the embeddings in training, times neftune_alpha / sqrt(tokens * width); 5 is usual
    for conversations, 0 turns it off (Jain et al. 2023, NEFTune)."""


# Above, it is no longer what is learned beside something else, and takes more memory than that.
_MAX_REPLAYED = 0.5


def parsed_replay(words: Sequence[str]) -> list[tuple[Path, float]]:
    """Dataset directory and share of each --replay.

    Raises:
        UsageError: one is not DATASET:SHARE, or the shares are too large together.
    """
    found = []
    for word in words:
        place, _, number = word.rpartition(":")
        try:
            share = float(number)
        except ValueError:
            share = math.nan
        if not place or not 0 < share <= _MAX_REPLAYED:
            raise UsageError(
                f"--replay must be DATASET:SHARE with a share above 0 and up to {_MAX_REPLAYED}, such as "
                f"data/datasets/general:0.1; found {word!r}"
            )
        found.append((Path(place), share))
    if (total := sum(share for _, share in found)) > _MAX_REPLAYED:
        raise UsageError(
            f"--replay: the shares are {total:g} together, more than {_MAX_REPLAYED}; lower them, or train "
            "on these documents by --dataset_dir"
        )
    return found


def check_fine_tuning(options: Any) -> None:
    """Refuse options that can never work.

    Raises:
        UsageError: they cannot.
    """
    at_least(options, 0, "lora_rank", "neftune_alpha")
    between(options, 0, 0.95, "lora_dropout")
    between(options, 1e-6, 1e3, "preference_beta")
    between(options, 0, 1, "teacher_weight")
    between(options, 0.01, 100, "teacher_temperature")
    parsed_replay(options.replay)
    if options.lora_alpha is not None and not options.lora_alpha > 0:
        raise UsageError(f"--lora_alpha must be above 0, found {options.lora_alpha!r}")
    if not all(name.strip() for name in options.lora_targets.split(",")):
        raise UsageError(
            f"--lora_targets must be all, or names of layers with commas such as q_proj,v_proj; found "
            f"{options.lora_targets!r}"
        )
    if options.lora_rank and options.model_path is None and options.resume is None:
        raise UsageError("--lora_rank adapts a pretrained model: name it with --model_path")
