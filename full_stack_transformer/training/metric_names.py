"""Names of the curves and texts in TensorBoard, so that who writes and who reads them agree.

TensorBoard makes a group of panels of what stands before the slash, sorts the groups, and opens the first
two: hence text samples come before settings, and histograms last.
"""

TRAIN_LOSS = "train/loss"
TRAIN_PERPLEXITY = "train/perplexity"
EPOCH = "train/epoch"
VALID_LOSS = "valid/loss"
VALID_PERPLEXITY = "valid/perplexity"
VALID_BITS_PER_BYTE = "valid/bits_per_byte"
LEARNING_RATE = "optimization/learning_rate"
GRADIENT_NORM = "optimization/gradient_norm"
TOKENS_PER_SECOND = "throughput/tokens_per_second"
MODEL_FLOPS_UTILIZATION = "throughput/mfu"
RESIDENT_MEGABYTES = "memory/resident_megabytes"
CUDA_MEGABYTES = "memory/cuda_allocated_megabytes"

ARGUMENTS_TEXT = "settings/arguments"
DATASET_TEXT = "settings/dataset"
# Before the number of a text sample, and before the name of a parameter.
SAMPLE_TEXT = "sample"
WEIGHT_HISTOGRAM = "weights"
GRADIENT_HISTOGRAM = "weights_gradients"

# Under this key of what a training step returns: its part of the mean cross entropy of an optimizer step,
# times the number of processes.
CROSS_ENTROPY = "cross_entropy"
