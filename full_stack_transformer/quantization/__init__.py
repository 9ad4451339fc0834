"""Weights of 8 and 4 bits: rounded, calibrated, and kept in the model directory."""
