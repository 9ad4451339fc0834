"""Low-rank adapters: small matrices beside those of a model that stays as it is, by the package peft.

    backbone ──add_adapter──> the same backbone, of which only the adapter is trained
             ──save_adapter──> adapter_config.json, adapter_model.safetensors: what PEFT and vLLM open
    adapter directory ──merge_adapter──> a plain backbone

Hu et al. 2021 (LoRA, arXiv 2106.09685), Kalajdzievski 2023 (rsLoRA, 2312.03732), Liu et al. 2024 (DoRA,
2402.09353). Knows nothing of training.
"""

import hashlib
import math
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel as Backbone

from full_stack_transformer.arguments.fine_tuning import AdapterOptions
from full_stack_transformer.errors import (
    MissingExtraError,
    ModelError,
    UsageError,
    install_command,
)
from full_stack_transformer.modelling.other_files import ADAPTER_FILE_NAME, json_of
from full_stack_transformer.modelling.pretrained import load_backbone, reason_of
from full_stack_transformer.modelling.writing import CARD_FILE_NAME, written_whole
from full_stack_transformer.storage import (
    DESCRIPTION_FILE_NAME,
    write_json,
    write_text,
)

if TYPE_CHECKING:
    from peft import LoraConfig, PeftConfig, PeftModel

ADAPTER_WEIGHTS_NAME = "adapter_model.safetensors"
_WEIGHTS_NAMES = (ADAPTER_WEIGHTS_NAME, "adapter_model.bin")
# PEFT's name of the only adapter of a model, and its prefix in files.
_NAME = "default"
_PREFIX = "base_model.model."
# Keys of adapter_config.json that make PEFT import modules.
IMPORTING_KEYS = ("auto_mapping", "megatron_config", "megatron_core")
# Numbers of a weight that are hashed at once.
_HASHED_AT_ONCE = 1 << 24


def check_peft() -> None:
    """Tell that peft is missing before anything is opened.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise MissingExtraError(
            f"adapters need the package peft, which is not installed; install it with: "
            f"{install_command('peft')}"
        ) from error


def add_adapter(backbone: Backbone, options: AdapterOptions, *, base: str) -> None:
    """Add an untrained adapter, which changes no output yet, and freeze everything else.

    The drawn numbers come from torch's generator.

    Args:
        backbone: changed in place; it keeps its class.
        options: rank, scale and layers.
        base: directory or hub name that the weights are from, for adapter_config.json.

    Raises:
        MissingExtraError: peft is not installed.
        UsageError: --lora_targets names no layer of the model.
    """
    check_peft()
    from peft import inject_adapter_in_model

    with _quiet():
        try:
            inject_adapter_in_model(_config(backbone, options, base), backbone, adapter_name=_NAME)
        except ValueError as error:
            linear = sorted({name.rpartition(".")[2] for name, _ in _linear_layers(backbone)})
            raise UsageError(
                f"--lora_targets {options.lora_targets}: {reason_of(error)} The linear layers of this model "
                f"are {', '.join(linear)}"
            ) from error
    # In fp32, whatever the base has.
    for parameter in backbone.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def _config(backbone: Backbone, options: AdapterOptions, base: str) -> "LoraConfig":
    from peft import LoraConfig

    rank, is_stabilized = options.lora_rank, options.lora_kind == "rslora"
    alpha = options.lora_alpha or 2.0 * (math.sqrt(rank) if is_stabilized else rank)
    targets = [name.strip() for name in options.lora_targets.split(",")]
    if options.lora_targets == "all":
        targets = [name for name, _ in _linear_layers(backbone)]
    if options.lora_embeddings:
        tables = (backbone.get_input_embeddings(), backbone.get_output_embeddings())
        targets += [name for name, part in backbone.named_modules() if part in tables]
    path = Path(base)
    return LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=options.lora_dropout,
        target_modules=_short(targets, backbone),
        use_dora=options.lora_kind == "dora",
        use_rslora=is_stabilized,
        task_type="CAUSAL_LM",
        base_model_name_or_path=str(path.resolve()) if path.is_dir() else base,
    )


def _linear_layers(backbone: Backbone) -> Iterator[tuple[str, nn.Module]]:
    """All but the output layer; GPT-2's are called Conv1D."""
    head = backbone.get_output_embeddings()
    for name, part in backbone.named_modules():
        if part is not head and type(part).__name__ in ("Linear", "Conv1D"):
            yield name, part


def _short(targets: list[str], backbone: Backbone) -> list[str]:
    """Last parts of names where they name the same layers, as people and vLLM read them."""
    short = sorted({name.rpartition(".")[2] for name in targets})
    found = {
        name
        for name, _ in backbone.named_modules()
        if any(name == one or name.endswith(f".{one}") for one in short)
    }
    return short if found == set(targets) or not set(targets) <= found else sorted(targets)


def has_adapter(backbone: nn.Module) -> bool:
    """Whether `add_adapter` was here."""
    return hasattr(backbone, "peft_config")


@contextmanager
def without_adapter(backbone: Backbone) -> Iterator[None]:
    """The base alone, inside the `with`."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [part for part in backbone.modules() if isinstance(part, BaseTunerLayer)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def fingerprint_of_base(backbone: Backbone) -> str:
    """SHA-256 of all weights that are not trained: 1.5 GB/s."""
    digest = hashlib.sha256()
    for name, parameter in backbone.named_parameters():
        if not parameter.requires_grad:
            digest.update(name.encode())
            for part in parameter.detach().cpu().flatten().split(_HASHED_AT_ONCE):
                digest.update(part.contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def save_adapter(
    target: Path,
    backbone: Backbone,
    *,
    tokenizer_directory: Path,
    description: dict[str, Any],
    card: str = "",
    weights: Mapping[str, Tensor] | None = None,
) -> None:
    """Write an adapter directory, atomically, with the tokenizer beside the two files of the adapter.

    Args:
        target: the directory; an existing one stays until the new one is complete.
        backbone: with an adapter.
        tokenizer_directory: files that are copied into it.
        description: content of description.json.
        card: content of README.md; not written if empty.
        weights: by the backbone's own names, if they are not those in `backbone` itself.

    Raises:
        MachineError: the disk is full or cannot be written.
    """
    with written_whole(target, "the adapter") as partial:
        _write_adapter(partial, backbone, weights)
        shutil.copytree(tokenizer_directory, partial, dirs_exist_ok=True)
        write_json(partial / DESCRIPTION_FILE_NAME, description)
        if card:
            write_text(partial / CARD_FILE_NAME, card)


def _write_adapter(
    directory: Path, backbone: Backbone, weights: Mapping[str, Tensor] | None
) -> None:
    from peft import get_peft_model_state_dict

    state = backbone.state_dict() if weights is None else dict(weights)
    with _quiet():
        found = get_peft_model_state_dict(
            backbone, state_dict=state, adapter_name=_NAME, save_embedding_layers=False
        )
    tensors = {
        f"{_PREFIX}{name}": value.detach().cpu().contiguous() for name, value in found.items()
    }
    save_file(tensors, directory / ADAPTER_WEIGHTS_NAME, metadata={"format": "pt"})
    config: Any = backbone.peft_config[_NAME]
    was_inference, config.inference_mode = config.inference_mode, True
    config.save_pretrained(str(directory))
    config.inference_mode = was_inference
    # PEFT writes a set in the order of this process's hashes.
    path = directory / ADAPTER_FILE_NAME
    content = json_of(path)
    write_json(path, {**content, "target_modules": sorted(content["target_modules"])})


def merge_adapter(directory: Path, *, base: str) -> Backbone:
    """The base with the adapter added to its weights, in fp32: no trace of the adapter is left.

    Nothing is imported that the adapter names. Where it changes embeddings that the output layer shares, the
    two are taken apart.

    Raises:
        MissingExtraError: peft is not installed.
        ModelError: the base cannot be opened, or the adapter does not fit it.
    """
    check_peft()
    from peft import PeftModel

    if not any((directory / name).is_file() for name in _WEIGHTS_NAMES):
        raise ModelError(f"{directory} has {ADAPTER_FILE_NAME}, but no {ADAPTER_WEIGHTS_NAME}")
    backbone = load_backbone(base, dtype=torch.float32)
    with _quiet():
        try:
            config = _read_config(directory)
            wrapped = PeftModel.from_pretrained(backbone, str(directory), config=config)
        except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
            raise ModelError(
                f"the adapter {directory} cannot be added to {base}: {reason_of(error)}; name the model that "
                "it was trained on with --base"
            ) from error
        _check_loaded(wrapped, directory, base)
        _take_apart(backbone)
        merged: Backbone = wrapped.merge_and_unload(safe_merge=True)
    return merged


def _read_config(directory: Path) -> "PeftConfig":
    """adapter_config.json, without what makes PEFT import modules.

    Raises:
        ModelError: it is of another kind than LoRA.
    """
    from peft import PeftConfig

    content = json_of(directory / ADAPTER_FILE_NAME)
    if content.get("peft_type") != "LORA":
        raise ModelError(
            f"{directory / ADAPTER_FILE_NAME} should name the peft_type LORA, found "
            f"{content.get('peft_type')!r:.40}; only such adapters can be added to a model"
        )
    plain = {key: value for key, value in content.items() if key not in IMPORTING_KEYS}
    config: PeftConfig = PeftConfig.from_peft_type(**plain)
    return config


def _check_loaded(wrapped: "PeftModel", directory: Path, base: str) -> None:
    """Compare the matrices of the files with those of the model: PEFT passes over what it has no place for.

    Raises:
        ModelError: some are missing, or have no place.
    """
    from peft import get_peft_model_state_dict, load_peft_weights

    found, loaded = (
        {name for name in state if ".lora_" in name}
        for state in (
            load_peft_weights(str(directory), device="cpu"),
            get_peft_model_state_dict(wrapped, save_embedding_layers=False),
        )
    )
    differing = sorted(found ^ loaded)
    if differing:
        raise ModelError(
            f"the adapter {directory} does not fit {base}: {len(found - loaded)} of its matrices have no "
            f"place there, {len(loaded - found)} are missing ({differing[0]} …); name the model that it was "
            "trained on with --base"
        )


def _take_apart(backbone: Backbone) -> None:
    """Give the output layer weights of its own, where it shares those of embeddings with an adapter."""
    tables = (backbone.get_input_embeddings(), backbone.get_output_embeddings())
    if not any(hasattr(table, "base_layer") for table in tables) or None in tables:
        return
    inner, head = (getattr(table, "base_layer", table) for table in tables)
    if head.weight is inner.weight:
        head.weight = nn.Parameter(inner.weight.detach().clone())
        backbone.config.tie_word_embeddings = False


@contextmanager
def _quiet() -> Iterator[None]:
    """Without PEFT's advice on tied embeddings, which `_take_apart` follows."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
