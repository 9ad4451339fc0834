"""Option names of other trainers, for `fst train`.

Names with the same meaning are accepted; for the others the error says what to use instead. Standard library
only, like all of arguments/.
"""

from collections.abc import Callable, Sequence

from full_stack_transformer.errors import UsageError
from full_stack_transformer.tasks.catalogue import FILL_MASK_TASK

# Our options that had another name before, in files for --config and in arguments.json.
RENAMED = {"temperature": "simcse_temperature"}

# From the Hugging Face Trainer and its example scripts, Lightning and the Full Stack Deep Learning labs.
SAME: dict[str, str] = {
    "model_name_or_path": "model_path",
    "config_name": "model_config",
    "tokenizer_name": "tokenizer_path",
    "dataset_name": "dataset_dir",
    "max_seq_length": "max_length",
    "max_source_length": "max_length",
    "per_device_train_batch_size": "batch_size",
    "train_batch_size": "batch_size",
    "gradient_accumulation_steps": "accumulate_grad_batches",
    "num_train_epochs": "max_epochs",
    "max_grad_norm": "gradient_clip_val",
    "warmup_steps": "num_warmup_steps",
    "lr": "learning_rate",
    "lr_scheduler_type": "lr_schedule",
    "label_smoothing_factor": "label_smoothing",
    "logging_steps": "log_every_n_steps",
    "eval_steps": "val_check_interval",
    "resume_from_checkpoint": "resume",
    "gradient_checkpointing": "activation_checkpointing",
    "mlm_probability": "mask_probability",
    "wwm": "whole_word_masking",
    "optim": "optimizer",
    "auto_lr_find": "find_learning_rate",
}
# What to use instead, if no option has the same meaning.
INSTEAD: dict[str, str] = {
    **{old: f"--{new}" for old, new in RENAMED.items()},
    "warmup_ratio": "--num_warmup_steps N, a number of optimizer steps",
    "no_cuda": "--accelerator cpu",
    "use_cpu": "--accelerator cpu",
    "n_gpu": "--devices N",
    "evaluation_strategy": "--val_check_interval N batches (above 1), or a fraction of an epoch",
    "eval_strategy": "--val_check_interval N batches (above 1), or a fraction of an epoch",
    "evaluate_during_training": "nothing: each epoch ends with a validation (--val_check_interval)",
    "per_gpu_train_batch_size": "--batch_size, on each device",
    "per_gpu_eval_batch_size": "--batch_size, which validation uses too",
    "per_device_eval_batch_size": "--batch_size, which validation uses too",
    "eval_batch_size": "--batch_size, which validation uses too",
    "logging_dir": "--experiments_root; curves are in the experiment directory",
    "output_dir": "--experiments_root DIRECTORY --experiment_name NAME",
    "overwrite_output_dir": "nothing: each training makes a new version of --experiment_name",
    "overwrite_cache": "nothing: there is no cache",
    "cache_dir": "the environment variable HF_HOME",
    "preprocessing_num_workers": "nothing: rows are read in the training process",
    "dataloader_num_workers": "nothing: batches are built in the training process",
    "num_workers": "nothing: batches are built in the training process",
    "group_by_length": "--batching length, which is the default",
    "line_by_line": "fst prepare_dataset, which splits documents into samples",
    "block_size": "--max_sample_length of fst prepare_dataset",
    "mlm": f"--task {FILL_MASK_TASK}",
    "model_type": '--model_config FILE.json with {"model_type": …}, or a preset such as encoder-mini',
    "model_revision": "--model_path with a directory downloaded by hf download --revision",
    "use_auth_token": "the environment variable HF_TOKEN, or hf auth login",
    "token": "the environment variable HF_TOKEN, or hf auth login",
    "use_fast_tokenizer": "nothing: every tokenizer is a fast one",
    "fp16": "--precision 16",
    "bf16": "--precision bf16",
    "fp16_opt_level": "--precision 16",
    "amp_backend": "--precision 16",
    "tf32": "nothing: --precision auto decides",
    "local_rank": "--devices N; processes find each other",
    "past_index": "nothing: no model here keeps state between batches",
    "save_steps": "--checkpoint_every_n_minutes",
    "save_total_limit": "nothing: last.ckpt, previous.ckpt and best.ckpt are kept",
    "save_strategy": "--checkpoint_every_n_minutes",
    "load_best_model_at_end": "nothing: model/ is the best model",
    "greater_is_better": "nothing: it follows from --metric_for_best_model",
    "adafactor": "--optimizer muon, or adamw",
    "report_to": "nothing: curves go to TensorBoard (fst tensorboard)",
    "one_cycle_max_lr": "--learning_rate with --lr_schedule cosine",
    "one_cycle_total_steps": "--max_steps with --lr_schedule cosine",
    "loss": "nothing: --task decides, or --embedding_loss",
    "fast_dev_run": "--max_steps 1",
    "auto_scale_batch_size": "--find_batch_size",
    "checkpoint_callback": "--checkpoint_every_n_minutes",
    "progress_bar_refresh_rate": "--no_enable_progress_bar",
    "weights_summary": "nothing: the first log line has the number of parameters",
    "tpu_cores": "--accelerator tpu --devices N",
    "framework": "nothing: transformers 5 has no TensorFlow and no Flax; everything here is PyTorch",
}


def translate(words: Sequence[str]) -> list[str]:
    """Replace the option names of other trainers in a command line by ours.

    Raises:
        UsageError: an option has no counterpart; the message says what to use instead.
    """
    found: list[str] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        name, separator, value = word.partition("=")
        option = name.removeprefix("--").replace("-", "_") if name.startswith("--") else ""
        if option in INSTEAD:
            raise UsageError(f"unknown option --{option}; use instead: {INSTEAD[option]}")
        if option in _SPECIAL:
            if not separator:
                value = rest.pop(0) if rest and not rest[0].startswith("--") else ""
            found += _SPECIAL[option](value)
        elif option in SAME:
            found.append(f"--{SAME[option]}{separator}{value}")
        else:
            found.append(word)
    return found


def _gpus(value: str) -> list[str]:
    """The option of Lightning 1: a number, a list of indices, or -1 for all."""
    if value == "0":
        return ["--accelerator", "cpu"]
    return ["--accelerator", "gpu", "--devices", "auto" if value in ("", "-1") else value]


_SPECIAL: dict[str, Callable[[str], list[str]]] = {"gpus": _gpus}
