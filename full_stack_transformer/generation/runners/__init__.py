"""What computes logits for the engine: PyTorch, or the C++ decoder."""
