"""Tiny datasets of conversations and of preferences, with the tokenizer of a tiny model."""

import json
import shutil
from pathlib import Path

import numpy as np

from full_stack_transformer.datasets.corpus import CorpusWriter

_QUESTION = (4, 12)
_ANSWER = (2, 10)
_SPLITS = {"train": 40, "valid": 8}


def write_conversations(directory: Path, model_dir: Path, *, kind: str = "conversations") -> Path:
    """Random tokens, of which the answers are learned; of preferences each pair has one question.

    Args:
        directory: to write.
        model_dir: its tokenizer is the dataset's.
        kind: "conversations" or "preferences".
    """
    directory.mkdir(parents=True)
    tokenizer = directory / "tokenizer"
    tokenizer.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(model_dir / name, tokenizer / name)
    config = json.loads((model_dir / "config.json").read_text())
    description = {
        "format_version": 1,
        "kind": kind,
        "dataset_name": directory.name,
        "vocab_size": config["vocab_size"],
        "max_sample_length": 64,
        "special_token_ids": {
            name: config[f"{key}_token_id"]
            for name, key in (("begin", "bos"), ("end", "eos"), ("pad", "pad"))
        },
    }
    numbers = np.random.default_rng(5)

    def tokens(size: tuple[int, int]) -> list[int]:
        drawn = numbers.integers(3, config["vocab_size"], numbers.integers(*size))
        return [int(one) for one in drawn]

    for split, count in _SPLITS.items():
        with CorpusWriter(directory / split, config["vocab_size"], has_answers=True) as writer:
            for _ in range(count):
                question = tokens(_QUESTION)
                for _ in range(2 if kind == "preferences" else 1):
                    answers = [tokens(_ANSWER)]
                    ids, learned = [*question, *answers[0]], [0] * len(question)
                    learned += [1] * len(answers[0])
                    if kind == "conversations":
                        more, last = tokens(_QUESTION), tokens(_ANSWER)
                        ids += [*more, *last]
                        learned += [0] * len(more) + [1] * len(last)
                    writer.append(np.array(ids), np.array([len(ids)]), np.array(learned))
            description[f"number_of_{split}_samples"] = writer.num_samples
            description[f"number_of_{split}_tokens"] = writer.num_tokens
    (directory / "description.json").write_text(json.dumps(description))
    return directory
