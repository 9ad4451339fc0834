"""Backbones: new, pretrained, saved. Knows nothing of datasets, training or text."""
