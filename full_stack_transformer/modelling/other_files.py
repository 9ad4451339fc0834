"""What is at a path that is no model directory, or beside a config without weights, and what to type then.

Names GGUF files, adapters, datasets, experiments, and the formats of other programs. Never imports torch.
"""

import json
import re
import shlex
from pathlib import Path
from typing import Any

from full_stack_transformer.storage import versions

MODEL_DIRECTORY_NAME = "model"
ADAPTER_DIRECTORY_NAME = "adapter"
CONFIG_FILE_NAME = "config.json"
WEIGHTS_FILE_NAME, PICKLED_FILE_NAME = "model.safetensors", "pytorch_model.bin"
ADAPTER_FILE_NAME = "adapter_config.json"
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_PICKLES = (".bin", ".pt", ".pth")
# ending -> what such a file is
CODES_FILE_NAMES = {
    "int8": "quantized_int8.safetensors",
    "int4": "quantized_int4.safetensors",
}
"""What `fst quantize` writes, by the type of the weights."""
_FOREIGN_WEIGHTS = {
    ".h5": "weights of TensorFlow",
    ".msgpack": "weights of Flax",
    ".onnx": "an ONNX export",
    ".npz": "weights of MLX or NumPy",
    ".tflite": "a TFLite export",
    ".ot": "weights of Rust",
}


def found_at(path: Path) -> str:
    """What is at a path that is no model directory, and what to do."""
    if path.is_file():
        return _found_file(path)
    if path.is_dir():
        return _found_directory(path)
    beside = sorted(other.name for other in path.parent.glob("*.ckpt"))
    if path.suffix == ".ckpt" and beside:
        return f"no such file; there are {', '.join(beside)}"
    if HUB_NAME.fullmatch(str(path)) and path.suffix != ".ckpt":
        return (
            f"no such path; if {path} is a name on the hub: fst import_model {path}, then name "
            f"{_imported(path)}"
        )
    return "no such path"


def _found_file(path: Path) -> str:
    if is_gguf(path):
        return gguf_advice(path)
    if path.suffix == ".ckpt":
        return (
            "a checkpoint without its experiment: it holds weights, and no config and tokenizer; keep it in "
            f"EXPERIMENT/checkpoints/, beside EXPERIMENT/{MODEL_DIRECTORY_NAME}/"
        )
    if (path.parent / CONFIG_FILE_NAME).is_file():
        return f"a file of a model; name its directory: {path.parent}"
    if path.name.endswith((".zip", ".tar", ".tgz", ".tar.gz", ".tar.bz2", ".7z")):
        return "an archive; unpack it and name the directory that has config.json"
    if path.suffix in _FOREIGN_WEIGHTS:
        return f"{_FOREIGN_WEIGHTS[path.suffix]}; {download_advice(path.parent)}"
    if path.suffix in (".safetensors", *_PICKLES):
        return "weights without a config.json beside them; " + download_advice(path.parent)
    return "a file"


def _found_directory(path: Path) -> str:
    if not any(path.iterdir()):
        return "an empty directory"
    if (path / ADAPTER_FILE_NAME).is_file():
        return adapter_advice(path)
    ggufs = sorted(file for file in path.iterdir() if file.is_file() and is_gguf(file))
    if ggufs:
        return gguf_advice(ggufs[0])
    known = (
        broken_link(path) or _found_of_ours(path) or _found_inside(path) or _found_of_others(path)
    )
    return known or "a directory without config.json"


def broken_link(path: Path) -> str | None:
    """A link to a file that is gone, as in a cache that was copied without its blobs."""
    for file in sorted(path.iterdir()):
        if file.is_symlink() and not file.exists():
            return f"the broken link {file.name} -> {file.readlink()}; {download_advice(path)}"
    return None


def _found_of_ours(path: Path) -> str | None:
    """A dataset or an experiment, or one of their roots."""
    newest = versions(path.parent, path.name)[-1:]
    for directory in (path, *newest):
        if any((directory / "train").glob("corpus*.npy")):
            return (
                f"a dataset directory; train a model on it: fst train --dataset_dir {directory} "
                f"--experiment_name {path.name if directory != path else path.absolute().parent.name}"
            )
    for corpora in (path.glob("corpus*.npy"), path.glob("*/*/train/corpus*.npy")):
        for corpus in sorted(corpora)[-1:]:
            return (
                f"a part of the dataset directory {corpus.parents[1]}, or its root; train a model on it: fst "
                f"train --dataset_dir {corpus.parents[1]}"
            )
    if newest and any((one / MODEL_DIRECTORY_NAME).is_dir() for one in newest):
        numbers = ", ".join(one.name for one in versions(path.parent, path.name))
        return f"the experiments {numbers}; name one, such as {newest[0]}"
    for directory in (path, *newest):
        if (directory / ADAPTER_DIRECTORY_NAME / ADAPTER_FILE_NAME).is_file():
            return (
                "an experiment that trained an adapter; merge it with its base: fst merge "
                f"{directory}, then name {directory} again"
            )
        if (directory / "arguments.json").is_file() or any(directory.glob("checkpoints/*.ckpt")):
            return (
                "an experiment whose training has written no model yet; it does so at its first "
                f"validation: fst train --resume {directory}"
            )
    if any(path.glob("train.*")):
        return "files of training data; train a model on them with fst train (docs/training.md)"
    return None


def _found_inside(path: Path) -> str | None:
    """Models in folders of a directory, as in the Trainer's output or the hub's cache."""
    depths = ("*", "*/*", "*/*/*")
    for pattern in depths:
        inside = sorted(path.glob(f"{pattern}/{CONFIG_FILE_NAME}"), key=_natural)
        places = [one.parent for one in inside if not one.parent.name.endswith("_Pooling")]
        if places:
            more = f" and {len(places) - 1} more" if len(places) > 1 else ""
            return f"models in its folders; name one, such as {places[-1]}{more}"
    return None


def _natural(path: Path) -> list[tuple[int, str]]:
    """Sorts checkpoint-500 before checkpoint-1000."""
    return [(int(part or 0), text) for text, part in re.findall(r"(\D+)(\d*)", str(path))]


def _found_of_others(path: Path) -> str | None:
    files = sorted(file for file in path.iterdir() if file.is_file())
    names = {file.name for file in files}
    if "model_index.json" in names:
        return "a pipeline of diffusers, which makes images"
    if "params.json" in names or (path / "original").is_dir():
        return (
            "a model in the format of its makers (original/, params.json), without config.json; get the "
            "files for transformers: hf download NAME --exclude 'original/*' --local-dir DIRECTORY"
        )
    for file in files:
        if file.suffix == ".ckpt":
            return (
                f"a checkpoint ({file.name}) without config.json and tokenizer, which a training of another "
                "program wrote; save the model with transformers' save_pretrained there"
            )
        if file.suffix in _FOREIGN_WEIGHTS:
            return f"{_FOREIGN_WEIGHTS[file.suffix]} ({file.name}); {download_advice(path)}"
        if file.suffix in (".safetensors", *_PICKLES):
            return f"weights ({file.name}) without config.json; {download_advice(path)}"
    if {"tokenizer.json", "tokenizer_config.json"} & names:
        return "a tokenizer without a model"
    return None


def download_advice(directory: Path) -> str:
    return (
        "copy config.json and model.safetensors of the same model into it, or get the whole model: fst "
        "import_model OWNER/NAME"
    )


def adapter_advice(directory: Path) -> str:
    base = (
        json_of(directory / ADAPTER_FILE_NAME).get("base_model_name_or_path") or "an unnamed model"
    )
    kind = json_of(directory / ADAPTER_FILE_NAME).get("peft_type") or "PEFT"
    return (
        f"a PEFT adapter ({kind}) of {base}, which is no whole model; merge them: fst merge {directory}, "
        f"then name {_beside(directory, 'merged')}"
    )


def _beside(path: Path, what: str) -> Path:
    return path.with_name(f"{path.name}-{what}") if path.name else Path(what)


def is_gguf(path: Path) -> bool:
    """Whether a file is one, by its name or its first bytes."""
    return path.suffix.lower() == ".gguf" or start_of(path, 4) == b"GGUF"


def gguf_advice(path: Path) -> str:
    """What it is, and the command that makes a model directory of it."""
    return (
        f"a GGUF file of llama.cpp ({path.name}); make a model directory of it: fst import_model "
        f"{shlex.quote(str(path))}, then name {_imported(path)}"
    )


def _imported(source: Path) -> Path:
    """Where `fst import_model` writes a model by default."""
    return Path("data/models", source.name.removesuffix(".gguf"))


def other_weights(directory: Path) -> str:
    """Weights in other forms than those that are read, and what to do."""
    files = sorted(file for file in directory.iterdir() if file.is_file())
    broken = broken_link(directory)
    if broken is not None:
        return broken
    for file in files:
        if is_gguf(file):
            return gguf_advice(file)
    shards = [
        file.name for file in files if re.search(r"-\d{5}-of-\d{5}\.(safetensors|bin)$", file.name)
    ]
    if shards:
        index = f"{shards[0].partition('-')[0]}{Path(shards[0]).suffix}.index.json"
        return (
            f"{shards[0]} without {index}, which lists the files; hf download NAME {index} --local-dir "
            f"{directory}"
        )
    renamed = {".safetensors": WEIGHTS_FILE_NAME, **dict.fromkeys(_PICKLES, PICKLED_FILE_NAME)}
    likely = [file for file in files if file.suffix in renamed and file.name != "training_args.bin"]
    if likely:
        target = directory / renamed[likely[0].suffix]
        return f"{likely[0].name}; if these are its weights: mv '{likely[0]}' '{target}'"
    for file in files:
        if file.suffix in (*_FOREIGN_WEIGHTS, ".ckpt"):
            what = _FOREIGN_WEIGHTS.get(file.suffix, "a checkpoint of another program")
            return f"{what} ({file.name}); hf download NAME {WEIGHTS_FILE_NAME} --local-dir {directory}"
    if (directory / "original").is_dir():
        what = "the folder original/ with the format of its makers"
    elif (directory / "onnx").is_dir():
        what = "the folder onnx/ with exports"
    else:
        what = f"only {', '.join(file.name for file in files[:5])}"
    return f"{what}; hf download NAME '*.safetensors*' --local-dir {directory}"


def start_of(path: Path, num_bytes: int) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(num_bytes)
    except OSError:
        return b""


def json_of(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text("utf-8-sig"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
