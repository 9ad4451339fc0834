"""Names of the curves, so that who writes and who reads them agree."""

TRAIN_LOSS = "train/loss"
TRAIN_PERPLEXITY = "train/perplexity"
VALID_LOSS = "valid/loss"
VALID_PERPLEXITY = "valid/perplexity"
LEARNING_RATE = "optimization/learning_rate"
GRADIENT_NORM = "optimization/gradient_norm"
TOKENS_PER_SECOND = "throughput/tokens_per_second"
