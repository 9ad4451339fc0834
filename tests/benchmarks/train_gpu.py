"""One line of JSON: tokens/s and MFU on a GPU of a GPT-2 of 124 M parameters, ours beside nanoGPT's way.

python tests/benchmarks/train_gpu.py
python tests/benchmarks/train_gpu.py --device cpu --short    # tries the script on a processor

Rows of 1,024 random tokens in bf16, compiled, fused AdamW, gradients clipped. Ours is the task, the loader
and the Lightning loop of `fst train`; nanoGPT's way is its loop and its model without biases. MFU is PaLM's
count of FLOPs by the fastest matrix product in the same run; beside it by the peak of the data sheet, where
the name of the device is known. The batch has as many rows as its memory holds, 16 at most.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run by its path

from full_stack_transformer.machine import free_memory_bytes, measure_matmul_peak
from full_stack_transformer.training.lightning_trainer import quieten_libraries
from tests.benchmarks.train_peers import SHAPES, _data_and_task, _Model, _padded_batches

# layers, width, heads, vocabulary, rows, tokens; nanoGPT pads the vocabulary to a multiple of 64.
SHAPES["124M"] = (12, 768, 12, 50304, 16, 1024)


# Free bytes -> rows that fit, with nanoGPT's logits in fp32.
_ROWS = ((50e9, 16), (26e9, 8), (0, 4))
# Words of a device's name -> dense bf16 TFLOP/s with sums in fp32, by the makers' data sheets; the first one
# whose words all occur counts.
_PEAKS = (
    (("B200",), 2250),
    (("H200", "NVL"), 835),
    (("H200",), 989),
    (("H100", "PCIe"), 756),
    (("H100", "NVL"), 835),
    (("H100",), 989),
    (("A100",), 312),
    (("A10G",), 70),
    (("A10",), 125),
    (("A40",), 150),
    (("L40S",), 362),
    (("L40",), 181),
    (("L4",), 121),
    (("5090",), 210),
    (("4090",), 165),
    (("4080",), 97),
    (("3090",), 71),
)


def datasheet_teraflops(name: str) -> float | None:
    """Peak of a device of this name; none if it is not known."""
    return next((peak for words, peak in _PEAKS if all(word in name for word in words)), None)


class Clock:
    """Times the steps after the first ones, which compile."""

    def __init__(self, device: torch.device, num_warmup: int, num_steps: int) -> None:
        self._device = device
        self._num_warmup = num_warmup
        self.num_steps = num_warmup + num_steps
        self._step = 0
        self._started = self.seconds = 0.0

    def tick(self) -> bool:
        """Count a step; false after the last one."""
        self._step += 1
        if self._step == self._num_warmup:
            self._started = self._now()
        if self._step == self.num_steps:
            self.seconds = self._now() - self._started
            return False
        return True

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


class _Timed(pl.Callback):
    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self._clock.tick()


def train_ours(job: dict[str, Any], device: torch.device, clock: Clock) -> None:
    """The loop of `fst train`."""
    quieten_libraries()
    with tempfile.TemporaryDirectory() as directory:
        data, task = _data_and_task(job, directory)
        trainer = pl.Trainer(
            accelerator="gpu" if device.type == "cuda" else "cpu",
            devices=1,
            precision="bf16-mixed",
            max_epochs=1,
            max_steps=clock.num_steps,
            logger=False,
            limit_val_batches=0,
            gradient_clip_val=1.0,
            enable_checkpointing=False,
            callbacks=[_Timed(clock)],
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
        )
        trainer.fit(task, datamodule=data)


def train_nanogpt(job: dict[str, Any], device: torch.device, clock: Clock) -> None:
    """nanoGPT's loop, with the memory pinned as there."""
    model = _Model(job["shape"], bias=False).to(device)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    forward: Callable[..., torch.Tensor] = torch.compile(model) if job["compile"] else model
    for ids, _ in _padded_batches(job):
        moved = (ids.pin_memory() if device.type == "cuda" else ids).to(device, non_blocking=True)
        with torch.autocast(device.type, torch.bfloat16):
            loss = forward(moved[:, :-1].contiguous(), moved[:, 1:].contiguous())
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if not clock.tick():
            return


def main() -> None:
    """Train both, and print the line."""
    parser = argparse.ArgumentParser(description="Training speed on a GPU, beside nanoGPT's way")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--num_steps", type=int, default=30)
    parser.add_argument("--short", action="store_true", help="a tiny model, uncompiled")
    options = parser.parse_args()
    device = torch.device(options.device)
    shape, num_steps = ("tiny", 3) if options.short else ("124M", options.num_steps)
    job = {"shape": shape, "is_short": False, "num_documents": 512, "compile": not options.short}
    job["precision"] = "bf16"
    layers, width, heads, vocabulary, rows, tokens = SHAPES[shape]
    if not options.short:
        free = free_memory_bytes(device) or 0
        rows = next(number for needed, number in _ROWS if free >= needed)
        SHAPES[shape] = (layers, width, heads, vocabulary, rows, tokens)
    flops = 6 * (layers * 12 * width**2 + vocabulary * width) + 12 * layers * width * tokens
    peak = measure_matmul_peak(device, torch.bfloat16)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    result: dict[str, Any] = {"device": name, "torch": version("torch"), "shape": shape}
    result |= {"rows": rows, "tokens": tokens, "peak_tflops": round(peak / 1e12, 2)}
    datasheet = datasheet_teraflops(name)
    result["datasheet_tflops"] = datasheet
    for way, train in (("ours", train_ours), ("nanogpt", train_nanogpt)):
        torch.manual_seed(0)
        clock = Clock(device, num_warmup=5, num_steps=num_steps)
        train(job, device, clock)
        rate = num_steps * rows * tokens / clock.seconds
        result[way] = {"tokens_per_second": round(rate), "mfu": round(rate * flops / peak, 4)}
        if datasheet is not None:
            result[way]["mfu_of_datasheet"] = round(rate * flops / datasheet / 1e12, 4)
        if device.type == "cuda":
            result[way]["peak_memory_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
    result["ratio"] = round(
        result["ours"]["tokens_per_second"] / result["nanogpt"]["tokens_per_second"], 3
    )
    print(json.dumps(result))


if __name__ == "__main__":
    main()
