"""What is at the path of a model, told from its files; what cannot be opened is named, with the way out.

    path ──find_model_directory──> model directory ──check_model_files──> config and weights can be opened

Reads names, JSON and the headers of weights. Never imports torch, so that a mistake is told at once.
"""

import json
import math
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from full_stack_transformer.errors import ModelError
from full_stack_transformer.modelling.other_files import (
    ADAPTER_FILE_NAME,
    CODES_FILE_NAMES,
    CONFIG_FILE_NAME,
    HUB_NAME,
    MODEL_DIRECTORY_NAME,
    PICKLED_FILE_NAME,
    WEIGHTS_FILE_NAME,
    adapter_advice,
    download_advice,
    found_at,
    gguf_advice,
    is_gguf,
    json_of,
    other_weights,
    start_of,
)
from full_stack_transformer.storage import check_pointer

CAUSAL_HEADS = ("ForCausalLM", "LMHeadModel")
"""How the names of model classes end that continue texts."""

# In the order in which transformers looks for them.
_READ_WEIGHTS = tuple(
    f"{name}{ending}"
    for name in (WEIGHTS_FILE_NAME, PICKLED_FILE_NAME)
    for ending in ("", ".index.json")
)
_TOKENIZER_FILES = (
    *("tokenizer.json", "vocab.json", "vocab.txt", "tokenizer.model", "spiece.model"),
    *("sentencepiece.bpe.model", "tokenizer_config.json"),
)
# Classes of encoder-decoders whose head reads a text, and which open like those of encoders.
_READING_HEADS = ("ForSequenceClassification", "ForQuestionAnswering", "ForTokenClassification")
# What an encoder with this head does, in words.
_ABILITIES = {
    "ForMaskedLM": "fills in masked words",
    "ForPreTraining": "fills in masked words",
    "ForSequenceClassification": "classifies texts",
    "ForTokenClassification": "labels words",
    "ForQuestionAnswering": "finds answers in a text",
    "ForMultipleChoice": "chooses between texts",
}
_ENCODERS = (
    *(
        "albert",
        "bert",
        "big_bird",
        "camembert",
        "deberta",
        "deberta-v2",
        "distilbert",
        "electra",
        "ernie",
    ),
    *(
        "eurobert",
        "funnel",
        "ibert",
        "longformer",
        "mobilebert",
        "modernbert",
        "mpnet",
        "nomic_bert",
    ),
    *(
        "nystromformer",
        "rembert",
        "roberta",
        "roformer",
        "squeezebert",
        "xlm-roberta",
        "xmod",
        "yoso",
    ),
)
# Files beside the config that only quantised models have.
_QUANTISED_FILES = {
    "quantize_config.json": "GPTQ",
    "quant_config.json": "AWQ",
    "hf_quant_config.json": "ModelOpt",
    "qmodel.pt": "HQQ",
}
_QUANTISED_TENSOR = re.compile(
    r"\.(qweight|qzeros|g_idx|SCB|absmax|quant_map|W_q|weight_packed|weight_scale(_inv)?|scales)$|bitsandbytes__"
)
_PACKED_TYPES = ("F8", "I8", "U8", "I32", "F4")


def find_model_directory(path: Path) -> Path:
    """The model directory for a path: itself, or `model` of an experiment or of a checkpoint's experiment.

    Raises:
        ModelError: there is none.
    """
    if path.suffix == ".ckpt" and path.exists():
        directory = path.parent.parent / MODEL_DIRECTORY_NAME
    elif (path / MODEL_DIRECTORY_NAME / CONFIG_FILE_NAME).is_file():
        directory = path / MODEL_DIRECTORY_NAME
    else:
        directory = path
    if not (directory / CONFIG_FILE_NAME).is_file():
        raise ModelError(
            f"{path} should be a model directory, an experiment directory or one of its .ckpt files; "
            f"found {found_at(path)}"
        )
    return directory


def check_start(model_path: str) -> None:
    """Look at the model to start a training from; what is no directory may be a name of the hub.

    Raises:
        ModelError: it is a directory or file that cannot be opened.
    """
    path = Path(model_path)
    if not path.exists() and HUB_NAME.fullmatch(model_path):
        return
    directory = find_model_directory(path)
    if directory != path:
        raise ModelError(
            f"--model_path {path} is not a model directory, but has one: pass --model_path {directory}"
        )
    check_model_files(path)


def check_model_files(directory: Path) -> None:
    """Check config.json, and that complete weights are there.

    Raises:
        ModelError: it cannot be opened.
    """
    _check_adapter(directory)
    config = read_config(directory)
    check_config(config, directory)
    _check_weights(directory)


def read_config(directory: Path) -> dict[str, Any]:
    """The content of config.json.

    Raises:
        ModelError: it is no JSON object, or describes no model of transformers.
    """
    path = directory / CONFIG_FILE_NAME
    check_pointer(path, ModelError)
    try:
        config = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{path} should be a JSON object: {error}; {download_advice(directory)}"
        ) from error
    if not isinstance(config, dict):
        raise ModelError(f"{path} should be a JSON object, found {type(config).__name__}")
    if not isinstance(config.get("model_type"), str):
        found = ", ".join(list(config)[:5]) or "no field"
        raise ModelError(
            f"{path} names no model_type such as llama or bert (found {found}), so it is no config of "
            f"transformers; {download_advice(directory)}"
        )
    return config


def check_config(config: Mapping[str, Any], directory: Path) -> None:
    """Refuse quantised models and encoder-decoders.

    Raises:
        ModelError: it is one.
    """
    method = _quantisation(config, directory)
    if method is not None:
        base = _base_model(directory)
        raise ModelError(
            f"{directory} is quantised with {method}, and only full weights are read; get the model that was "
            f"quantised: fst import_model {base or 'OWNER/NAME'}, then make it small while it runs: fst "
            "serve DIRECTORY --weights_dtype int8"
        )
    architecture = architecture_of(config)
    if config.get("is_encoder_decoder") and not architecture.endswith(_READING_HEADS):
        raise ModelError(
            f"{directory} holds an encoder-decoder ({architecture or config['model_type']}), which no "
            "command here runs; choose a model whose config.json names a class …ForCausalLM to generate, or "
            'an encoder to read texts; transformers runs it: python -c "from transformers import '
            f"AutoModelForSeq2SeqLM; AutoModelForSeq2SeqLM.from_pretrained('{directory}')\""
        )


def check_generates(config: Mapping[str, Any], directory: Path) -> None:
    """Refuse an encoder: transformers would open some as if they could continue a text.

    Raises:
        ModelError: it is one.
    """
    architecture = architecture_of(config)
    abilities = dict(_ABILITIES)
    if config.get("model_type") in _ENCODERS:
        abilities["Model"] = "gives vectors of texts"
    ability = next((does for end, does in abilities.items() if architecture.endswith(end)), None)
    if config.get("is_decoder") or ability is None:
        return
    raise ModelError(
        f"{directory} holds {architecture}, which {ability} and cannot continue texts; serve it: fst serve "
        f"{directory}; to generate choose a model whose config.json names a class …ForCausalLM"
    )


def check_tokenizer_files(directory: Path) -> None:
    """Refuse a model directory without any file of a tokenizer.

    Raises:
        ModelError: there is none.
    """
    if not any((directory / name).is_file() for name in _TOKENIZER_FILES):
        raise ModelError(
            f"{directory} has no tokenizer (tokenizer.json, or vocab.json and merges.txt); copy these files "
            "of the model that it was made from into it, or: hf download NAME --include 'tokenizer*' "
            f"--local-dir {directory}"
        )
    for name in _TOKENIZER_FILES:
        if (directory / name).is_file():
            check_pointer(directory / name, ModelError)


def architecture_of(config: Mapping[str, Any]) -> str:
    """The model class that a config names, or an empty string."""
    named = config.get("architectures")
    return str(named[0]) if isinstance(named, list) and named else ""


def _check_adapter(directory: Path) -> None:
    if (directory / ADAPTER_FILE_NAME).is_file():
        raise ModelError(
            f"{directory} holds {adapter_advice(directory)}; if the weights beside it are merged already, "
            f"remove {directory / ADAPTER_FILE_NAME}"
        )


# ---------------------------------------------------------------------- quantised


def _quantisation(config: Mapping[str, Any], directory: Path) -> str | None:
    """The method by which a model is quantised."""
    inner = config.get("text_config")
    for part in (config, inner if isinstance(inner, dict) else {}):
        found = part.get("quantization_config") or part.get("compression_config")
        if isinstance(found, dict):
            bits = found.get("bits") or (4 if found.get("load_in_4bit") else None)
            method = found.get("quant_method") or found.get("quant_type") or "an unnamed method"
            return f"{method} ({bits} bits)" if bits else str(method)
        if isinstance(part.get("quantization"), dict):
            return f"MLX ({part['quantization'].get('bits')} bits)"
    for name, method in _QUANTISED_FILES.items():
        if (directory / name).is_file():
            return f"{method} ({name})"
    return None


def _base_model(directory: Path) -> str | None:
    """What the model card says that the model was made from."""
    card = directory / "README.md"
    text = card.read_text("utf-8", "replace")[:10_000] if card.is_file() else ""
    found = re.search(r"^base_model:\s*(?:-\s*)?([\w./-]+)\s*$", text, re.MULTILINE)
    return found.group(1) if found else None


# ---------------------------------------------------------------------- weights


def _check_weights(directory: Path) -> None:
    """Check that the weights are all there, and that no file is cut off.

    Raises:
        ModelError: they are not.
    """
    for name in _READ_WEIGHTS:
        file = directory / name
        if not file.is_file():
            continue
        files = _shards(file) if name.endswith(".index.json") else [file]
        for one in files:
            _check_file(one)
        return
    rounded = rounded_files(directory)
    if rounded:
        for one in rounded:
            check_pointer(one, ModelError)
        return
    raise ModelError(
        f"{directory} has config.json, but no weights that are read here: found {other_weights(directory)}"
    )


def weight_files(directory: Path) -> list[Path]:
    """The files of the full weights that transformers would read; none where there are none."""
    for name in _READ_WEIGHTS:
        file = directory / name
        if file.is_file():
            return _shards(file) if name.endswith(".index.json") else [file]
    return []


def rounded_files(directory: Path) -> list[Path]:
    """The files of `fst quantize`."""
    files = [directory / name for name in CODES_FILE_NAMES.values()]
    return [file for file in files if file.is_file()]


def num_weights(directory: Path) -> int:
    """Numbers in the safetensors files of a checked model directory; 0 where there are none."""
    for name in _READ_WEIGHTS:
        file = directory / name
        if file.is_file() and "safetensors" in name:
            files = _shards(file) if name.endswith(".index.json") else [file]
            headers = [_header(one) or {} for one in files]
            return sum(
                math.prod(entry["shape"])
                for header in headers
                for tensor, entry in header.items()
                if tensor != "__metadata__"
            )
    return 0


def _shards(index: Path) -> list[Path]:
    check_pointer(index, ModelError)
    named = json_of(index).get("weight_map")
    if not isinstance(named, dict) or not named:
        raise ModelError(
            f"{index} should list the files of the weights under weight_map, found none"
        )
    names = sorted({str(name) for name in named.values()})
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise ModelError(
            f"{index.parent} lacks {len(missing)} of the {len(names)} files of its weights: "
            f"{', '.join(missing[:3])}; copy them too, or: hf download NAME {missing[0]} --local-dir "
            f"{index.parent}"
        )
    return [index.parent / name for name in names]


def _check_file(path: Path) -> None:
    check_pointer(path, ModelError)
    size = path.stat().st_size
    if not size:
        raise ModelError(f"{path} is empty; {download_advice(path.parent)}")
    if path.suffix != ".safetensors":
        _check_pickle(path)
        return
    header = _header(path)
    if header is None:
        raise ModelError(
            f"{path} is no file of safetensors, or a damaged one (it starts with {start_of(path, 12)!r}); "
            f"{download_advice(path.parent)}"
        )
    tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
    if not tensors:
        raise ModelError(f"{path} holds no tensors; {download_advice(path.parent)}")
    expected = _data_start(path) + max(entry["data_offsets"][1] for entry in tensors.values())
    if size < expected:
        raise ModelError(
            f"{path} is cut off: {size:,} of {expected:,} bytes are there; {download_advice(path.parent)}"
        )
    _check_tensors(path, tensors)


def _check_pickle(path: Path) -> None:
    """A file of torch.save is a zip archive, or an old plain pickle."""
    if is_gguf(path):
        raise ModelError(f"{path.parent} holds {gguf_advice(path)}")
    if not start_of(path, 2).startswith((b"PK", b"\x80")):
        raise ModelError(
            f"{path} is no file of PyTorch, or a damaged one (it starts with {start_of(path, 12)!r}); "
            f"{download_advice(path.parent)}"
        )


def _check_tensors(path: Path, tensors: Mapping[str, Any]) -> None:
    """Refuse quantised weights whose config does not say so, and those of an adapter."""
    for name, entry in tensors.items():
        is_packed = str(entry.get("dtype")).startswith(_PACKED_TYPES) and name.endswith("weight")
        if is_packed or _QUANTISED_TENSOR.search(name):
            raise ModelError(
                f"{path} holds quantised weights ({name}, {entry.get('dtype')}), and only full ones are "
                "read; get the model that was quantised: fst import_model OWNER/NAME"
            )
        if ".lora_A." in name:
            raise ModelError(
                f"{path} holds an adapter ({name}) in place of a whole model; copy its {ADAPTER_FILE_NAME} "
                f"beside it, and merge it with its base: fst merge {path.parent}"
            )


def _header(path: Path) -> dict[str, Any] | None:
    """Names, types and places of the tensors of a safetensors file; none if it cannot be read."""
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(min(length, 100_000_000)))
            offsets = [
                entry["data_offsets"][1] for name, entry in header.items() if name[:2] != "__"
            ]
    except (OSError, ValueError, struct.error, KeyError, TypeError, AttributeError, IndexError):
        return None
    return header if all(isinstance(one, int) for one in offsets) else None


def _data_start(path: Path) -> int:
    return 8 + int.from_bytes(start_of(path, 8), "little")
