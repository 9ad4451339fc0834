"""Whether speed costs quality: the validation loss of `fst train` and of a plain loop in fp32.

python tests/benchmarks/train_quality.py --dataset_dir data/datasets/python_docs --short

For each seed the same model with the same first weights sees the same batches in the same order: once by
`fst train` as it is fastest here (bf16, attention written out, compiled layers, one-pass loss), once in a
loop of ten lines with transformers' model as it comes, fp32 and torch's own loss. The losses of each way
differ between seeds; the two ways should differ by less than that.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import torch
from transformers import PreTrainedModel as Backbone

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))  # run by its path, this script sees only its own directory

from full_stack_transformer.arguments.training import TrainArguments  # noqa: E402
from full_stack_transformer.datasets.corpus import (  # noqa: E402
    DatasetDirectory,
    open_dataset,
)
from full_stack_transformer.modelling.backbones import new_backbone  # noqa: E402
from full_stack_transformer.training.optimization import (  # noqa: E402
    learning_rate_factor,
    make_optimizer,
)
from tests.training.small_training import causal_data  # noqa: E402


def by_fst_train(arguments: TrainArguments, root: Path) -> float:
    """The validation loss that the real command ends with."""
    command = [
        *(sys.executable, "-m", "full_stack_transformer", "train"),
        *("--dataset_dir", str(arguments.dataset_dir), "--experiments_root", str(root)),
        *("--model_config", arguments.model_config, "--batch_size", str(arguments.batch_size)),
        *("--max_steps", str(arguments.max_steps), "--max_epochs", "-1"),
        *("--seed", str(arguments.seed), "--num_generated_samples", "0", "--accelerator", "cpu"),
        *("--compile", "always", "--val_check_interval", "1000000"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=HERE.parents[1])
    if done.returncode:
        raise SystemExit(done.stderr)
    summary = json.loads((Path(done.stdout.strip()) / "summary.json").read_text(encoding="utf-8"))
    return float(summary["best_validation_loss"])


def by_plain_loop(arguments: TrainArguments, dataset: DatasetDirectory) -> float:
    """The validation loss after the same batches, computed as plainly as can be."""
    torch.manual_seed(arguments.seed)
    backbone = new_backbone(
        arguments.model_config,
        vocab_size=dataset.description["vocab_size"],
        max_length=dataset.description["max_sample_length"],
        special_token_ids=dataset.description["special_token_ids"],
    )
    data = causal_data(dataset, arguments)
    data.trainer = SimpleNamespace(global_rank=0, world_size=1)  # type: ignore[assignment]
    optimizer = make_optimizer(
        backbone,
        name="adamw",
        learning_rate=arguments.peak_learning_rate,
        weight_decay=arguments.weight_decay,
    )
    for step, batch in enumerate(data.train_dataloader()):
        if step == arguments.max_steps:
            break
        factor = learning_rate_factor(
            step,
            step / arguments.max_steps,
            name="cosine",
            num_warmup_steps=arguments.warmup_steps,
            num_cycles=1,
            decay_fraction=arguments.decay_fraction,
            min_ratio=arguments.min_learning_rate_ratio,
        )
        for group in optimizer.param_groups:
            group["lr"] = arguments.peak_learning_rate * factor
        loss = mean_loss(backbone, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(backbone.parameters(), arguments.gradient_clip_val)
        optimizer.step()
        optimizer.zero_grad()
    return validation_loss(backbone, dataset)


def mean_loss(backbone: Backbone, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Of the targets of a batch, by torch."""
    logits = backbone(input_ids=batch["input_ids"], use_cache=False).logits
    return torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()
    )


@torch.inference_mode()
def validation_loss(backbone: Backbone, dataset: DatasetDirectory) -> float:
    """Mean over all targets of the validation samples, each computed by itself."""
    backbone.eval()
    total = num_targets = 0.0
    for number in range(len(dataset.valid)):
        ids = torch.from_numpy(dataset.valid[number])[None]
        logits = backbone(input_ids=ids, use_cache=False).logits[0, :-1]
        total += float(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))
        num_targets += ids.shape[1] - 1
    return total / num_targets


def main() -> None:
    """Train both ways with several seeds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset_dir", type=Path, required=True)
    parser.add_argument("--max_steps", type=int, default=150)
    parser.add_argument("--num_seeds", type=int, default=3)
    parser.add_argument("--short", action="store_true", help="two seeds of few steps")
    options = parser.parse_args()
    if options.short:
        options.max_steps, options.num_seeds = 10, 2
    dataset = open_dataset(options.dataset_dir)
    ours, plain = [], []
    for seed in range(options.num_seeds):
        arguments = TrainArguments(
            dataset_dir=dataset.directory,
            model_config="mini",
            batch_size=8,
            max_epochs=-1,
            max_steps=options.max_steps,
            seed=seed,
        )
        with tempfile.TemporaryDirectory() as root:
            ours.append(by_fst_train(arguments, Path(root)))
        plain.append(by_plain_loop(arguments, dataset))
        print(f"seed {seed}: fst train {ours[-1]:.4f}, plain fp32 loop {plain[-1]:.4f}", flush=True)
    spread = max(statistics.stdev(ours), statistics.stdev(plain))
    difference = abs(statistics.mean(ours) - statistics.mean(plain))
    print(f"means differ by {difference:.4f}; standard deviation over seeds {spread:.4f}")
    ratio = round(spread / max(difference, 1e-6), 2)
    results = {"ratios": {"spread over seeds / difference": ratio}}
    aims = {"aims": {"spread over seeds / difference": 1.0}}
    print(json.dumps({"benchmark": "train_quality", **results, **aims}))


if __name__ == "__main__":
    main()
