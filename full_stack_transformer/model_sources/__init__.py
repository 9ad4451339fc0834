"""Pretrained models from elsewhere -> model directories."""
