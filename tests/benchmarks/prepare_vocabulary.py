"""The vocabulary of the benchmark of preparation, in the form that each subject opens.

python tests/benchmarks/prepare_vocabulary.py train DOCUMENTS DIRECTORY
python tests/benchmarks/prepare_vocabulary.py convert DATASET_DIR DIRECTORY

`train` makes a byte-level BPE of 8,192 tokens on the first megabytes of DOCUMENTS, for machines without
GPT-2's. `convert` reads a prepared dataset and prints, as one line of JSON, how its samples are framed and
cut, with the files it wrote for the peers: the fields of `prepare_peers.Job`.
"""

import argparse
import base64
import json
from pathlib import Path
from typing import Any

END_OF_DOCUMENT = "[END_OF_DOCUMENT]"

_VOCAB_SIZE = 8192
_TRAINING_CHARACTERS = 4_000_000


def train(documents: Path, directory: Path) -> dict[str, Any]:
    """Train a tokenizer on the beginning of `documents` and save it."""
    from full_stack_transformer.tokenization.document_tokenizer import TrainedTokenizer

    with documents.open(encoding="utf-8") as file:
        texts = file.read(_TRAINING_CHARACTERS).split(f"\n{END_OF_DOCUMENT}\n")
    tokenizer = TrainedTokenizer.train(texts, vocab_size=_VOCAB_SIZE)
    tokenizer.save(directory, model_max_length=256)
    return {"vocab_size": tokenizer.vocab_size}


def convert(dataset: Path, directory: Path) -> dict[str, Any]:
    """Write the vocabulary of a prepared dataset for every peer; the fields of a job that concern it."""
    directory.mkdir(parents=True, exist_ok=True)
    description = json.loads((dataset / "description.json").read_text(encoding="utf-8"))
    tokenizer_json = dataset / "tokenizer" / "tokenizer.json"
    content = json.loads(tokenizer_json.read_text(encoding="utf-8"))
    full, bare, ranks = (directory / name for name in ("full.json", "bare.json", "ranks.tiktoken"))
    full.write_bytes(tokenizer_json.read_bytes())
    without_added = {**content, "added_tokens": [], "post_processor": None}
    bare.write_text(json.dumps(without_added, ensure_ascii=False), encoding="utf-8")
    ranks.write_text(_ranks(content["model"]), encoding="ascii")
    space = " " if description["tokenizer_cls_name"] == "GPT2Tokenizer" else ""
    return {
        "tokenizer_json": str(full),
        "bare_tokenizer_json": str(bare),
        "ranks": str(ranks),
        "before": space,
        "after": space,
        "begin_id": description["special_token_ids"]["begin"],
        "end_id": description["special_token_ids"]["end"],
        "dtype": description["dtype"],
        "max_sample_length": description["max_sample_length"],
        "min_sample_length": description["min_sample_length"],
    }


def _ranks(model: dict[str, Any]) -> str:
    """A byte-level BPE as tiktoken's file: a line per token, its bytes in base64 and its id.

    tiktoken merges the pair of lowest id first, which is the order of the merges: ids grow with them.
    """
    byte_of = _byte_of_character()
    merges = (merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"])
    tokens = [*byte_of, *("".join(merge) for merge in merges)]
    lines = []
    for token in sorted(set(tokens), key=model["vocab"].__getitem__):
        spelled = base64.b64encode(bytes(byte_of[character] for character in token)).decode()
        lines.append(f"{spelled} {model['vocab'][token]}\n")
    return "".join(lines)


def _byte_of_character() -> dict[str, int]:
    """GPT-2's alphabet: printable bytes of Latin-1 are themselves, the others follow from U+0100 on."""
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(0x100) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    return alphabet | {chr(0x100 + number): byte for number, byte in enumerate(others)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("command", choices=("train", "convert"))
    parser.add_argument("source", type=Path)
    parser.add_argument("directory", type=Path)
    options = parser.parse_args()
    run = {"train": train, "convert": convert}[options.command]
    print(json.dumps(run(options.source, options.directory)), flush=True)


if __name__ == "__main__":
    main()
