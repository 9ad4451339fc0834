"""Models that embed texts: pooling, whitening, and the directory format of sentence-transformers."""
