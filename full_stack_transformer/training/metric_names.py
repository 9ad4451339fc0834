"""Names of the metrics, and of the curves and texts in TensorBoard.

TensorBoard groups panels by the part before the slash, sorts the groups, and opens the first two: hence text
samples come before settings, and histograms last.
"""

TRAIN_LOSS = "train/loss"
TRAIN_PERPLEXITY = "train/perplexity"
# Of the documents of --replay alone; the two above are without them.
TRAIN_REPLAY_LOSS = "train/replay_loss"
EPOCH = "train/epoch"
# Prefix of the metrics of a validation.
VALID = "valid"
LOSS = "loss"
PERPLEXITY = "perplexity"
BITS_PER_BYTE = "bits_per_byte"
VALID_LOSS = f"{VALID}/{LOSS}"
VALID_PERPLEXITY = f"{VALID}/{PERPLEXITY}"
VALID_BITS_PER_BYTE = f"{VALID}/{BITS_PER_BYTE}"
LEARNING_RATE = "optimization/learning_rate"
GRADIENT_NORM = "optimization/gradient_norm"
TOKENS_PER_SECOND = "throughput/tokens_per_second"
MODEL_FLOPS_UTILIZATION = "throughput/mfu"
RESIDENT_MEGABYTES = "memory/resident_megabytes"
CUDA_MEGABYTES = "memory/cuda_allocated_megabytes"

ARGUMENTS_TEXT = "settings/arguments"
DATASET_TEXT = "settings/dataset"
# Prefixes: of the index of a text sample, and of the name of a parameter.
SAMPLE_TEXT = "sample"
WEIGHT_HISTOGRAM = "weights"
GRADIENT_HISTOGRAM = "weights_gradients"

# Key in the outputs of a training step: its part of the mean cross entropy of the optimizer step, times the
# number of processes.
CROSS_ENTROPY = "cross_entropy"
# The same of the documents of --replay, in the steps that have any.
REPLAY_LOSS = "replay_loss"
# Among Lightning's callback metrics: the value that decides which model is the best; lower is better.
SELECTION = "selection"


def is_better_when_lower(metric: str) -> bool:
    """Whether a lower value of this metric is better."""
    return metric in (LOSS, PERPLEXITY, BITS_PER_BYTE) or metric.endswith(("_error", "_loss"))
