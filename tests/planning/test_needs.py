"""Memory and disk by formulas."""

import pytest

from full_stack_transformer.datasets.corpus import DatasetDirectory
from full_stack_transformer.planning.needs import (
    cache_bytes_per_token,
    checkpoint_bytes,
    dataset_bytes,
    optimizer_bytes,
    serving_memory,
    training_memory,
)
from full_stack_transformer.planning.shapes import shape_of_option, shape_of_size


def test_a_dataset_takes_what_the_real_one_takes(dataset: DatasetDirectory) -> None:
    found = dataset.description
    tokens = sum(found[f"number_of_{split}_tokens"] for split in ("train", "valid"))
    samples = sum(found[f"number_of_{split}_samples"] for split in ("train", "valid"))
    files = [*dataset.directory.glob("*/*.npy")]
    real = sum(file.stat().st_size for file in files) - 128 * len(files)  # NumPy's headers
    assert dataset_bytes(tokens, found["vocab_size"], tokens / samples) == pytest.approx(real)
    assert dataset_bytes(1e6, 100_000, 100) == pytest.approx(4.08e6)


def test_adamw_takes_sixteen_bytes_a_parameter_and_muon_fewer() -> None:
    shape = shape_of_option("base", 4096, 256)
    size = shape.num_parameters
    assert checkpoint_bytes(shape, "adamw") == 12 * size
    assert 4 * size < optimizer_bytes(shape, "muon") < 8 * size


def test_sharing_a_model_divides_its_memory_by_the_devices() -> None:
    shape = shape_of_size(7e9, 65_536)

    def total(strategy: str, devices: int) -> float:
        memory = training_memory(
            shape,
            optimizer="adamw",
            strategy=strategy,  # type: ignore[arg-type]
            num_devices=devices,
            tokens_per_batch=2048,
            checkpointed=True,
            bfloat16=True,
        )
        return memory.weights + memory.gradients + memory.optimizer

    one, copied = total("one device", 1), total("ddp", 8)
    assert one == 16 * shape.num_parameters
    assert copied == 20 * shape.num_parameters  # and the buckets of the gradients
    assert one / 8 < total("fsdp", 8) < one / 5
    assert total("fsdp", 64) < total("fsdp", 8)


def test_recomputing_saves_most_of_the_activations() -> None:
    shape = shape_of_size(1.3e9, 32_768)
    stored, recomputed = (
        training_memory(
            shape,
            optimizer="adamw",
            strategy="one device",
            num_devices=1,
            tokens_per_batch=8192,
            checkpointed=checkpointed,
            bfloat16=True,
        ).activations
        for checkpointed in (False, True)
    )
    assert recomputed < stored / 3


def test_keys_and_values_fill_what_the_weights_leave() -> None:
    shape = shape_of_option("gpt2", 50_257, 1024)
    # 2 x 12 layers x 768 x 2 bytes
    assert cache_bytes_per_token(shape) == 36_864
    memory = serving_memory(shape, max_length=1024, memory_bytes=24e9, weight_bytes=2)
    assert memory.num_texts == int((0.92 * 24e9 - 1e9 - memory.weights) / (1024 * 36_864))
    assert serving_memory(shape, max_length=1024, memory_bytes=1e9, weight_bytes=2).num_texts == 0
