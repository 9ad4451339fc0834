"""Callbacks around the training step: measuring, showing, exporting, saving, stopping."""
